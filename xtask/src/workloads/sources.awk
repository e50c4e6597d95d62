# Writes `sources` files of C and a header that all of them include. No other header and no library is needed.
BEGIN {
    srand(1)
    for (i = 0; i < 1500; i++) {
        printf "struct record%d { int key; long value[%d]; struct record%d *next; };\n", i, 1 + i % 7, i > "common.h"
        printf "long combine%d(struct record%d *record, long by);\n", i, i > "common.h"
    }
    close("common.h")
    for (file = 0; file < sources; file++) {
        name = "part" file ".c"
        print "#include \"common.h\"" > name
        for (f = 0; f < 150; f++) {
            r = int(rand() * 1500)
            printf "long part%d_%d(struct record%d *record, long by)\n{\n    long sum = by;\n", file, f, r > name
            printf "    while (record) {\n        for (int i = 0; i < %d; i++)\n", 1 + r % 7 > name
            printf "            sum = sum * %d + (record->value[i] ^ (sum >> %d));\n", 3 + f, 1 + f % 31 > name
            printf "        if (record->key == %d)\n            sum += combine%d(record, sum);\n", r, r > name
            printf "        record = record->next;\n    }\n    return sum;\n}\n" > name
        }
        close(name)
    }
}
