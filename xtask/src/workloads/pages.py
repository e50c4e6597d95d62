"""Cuts a file into pages for a web server and prints how many there are: pages.py FILE DIRECTORY

A page has 2 to 128 KiB, small ones being more frequent, and is named by its number.
"""

import sys
from _random import Random

random = Random(2).random
count = 0
with open(sys.argv[1], "rb") as corpus:
    while True:
        page = corpus.read(int(2048 * 64 ** random()))
        if not page:
            break
        with open(f"{sys.argv[2]}/{count}", "wb") as file:
            file.write(page)
        count += 1
print(count)
