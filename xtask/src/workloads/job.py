"""A job of a kind that is often run: it keeps a large store in memory and works on one part of it at a time.

The store is made of blocks of text. For some seconds the job draws blocks from a window of the store, more often from
the window's beginning than from its end; it counts a block's words in a table, and puts a new block in the old one's
place. Then the window moves on. Prints a line when the store is filled, and one for each hundred blocks.
"""

import sys
import time
from _random import Random

BLOCK_BYTES = 32 << 10
WINDOW_BLOCKS = 640
WINDOW_SECONDS = 6.0
TABLE_WORDS_MAX = 20_000

random = Random(1).random
words = [b"%x" % int(random() * 1e9) for _ in range(5000)]


def block():
    chosen = []
    size = 0
    while size < BLOCK_BYTES:
        word = words[int(random() * random() * 5000)]
        chosen.append(word)
        size += len(word) + 1
    return b" ".join(chosen)


def main():
    store_blocks = (int(sys.argv[1]) << 20) // BLOCK_BYTES
    seeds = [block() for _ in range(16)]
    store = [seed[cut:] + seed[:cut] for cut in range(store_blocks // 16) for seed in seeds]
    print("filled", flush=True)
    table = {}
    first = 0
    done = 0
    while True:
        end = time.monotonic() + WINDOW_SECONDS
        while time.monotonic() < end:
            index = (first + int(WINDOW_BLOCKS * random() * random())) % len(store)
            parts = store[index].split(b" ")
            for part in parts[::8]:
                table[part] = table.get(part, 0) + 1
            if len(table) > TABLE_WORDS_MAX:
                table.clear()
            cut = int(random() * len(parts))
            store[index] = b" ".join(parts[cut:] + parts[:cut])
            done += 1
            if done % 100 == 0:
                print(done, flush=True)
        first = (first + WINDOW_BLOCKS // 2) % len(store)


main()
