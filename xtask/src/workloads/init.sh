#!/bin/busybox sh
# The first process of the guest that `cargo xtask study` records. The kernel's command line says what it does:
#
#   workload=NAME     which loads to run; see the table at the end
#   KEY=VALUE         sizes, each with its default beside the load that uses it
#
# On the serial console it says, each on a line of its own:
#
#   vmferry-study: ready NAME                 all loads of this workload are running
#   vmferry-study: beat N LOAD=ROUNDS ...     every beat_s seconds, by default 1; how often each load has come to the end
#                                             of a round
#   vmferry-study: failed LOAD: WHY           a load has ended, which none of them does by itself
#
# A load is a function load_NAME. It prepares its data, says `round` once, and then works for ever, with a `round` after
# each unit of work. Nothing here starts a process for a heartbeat, so that an idle guest is idle.

export PATH=/usr/bin:/usr/sbin:/bin HOME=/tmp PYTHONHOME=/usr
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=80% tmpfs /tmp
mount -t tmpfs tmpfs /run
ifconfig lo 127.0.0.1 up
mkdir /run/rounds /run/log
# A pipe that nothing is ever written to: to read from it with a limit is to sleep, within this process.
mkfifo /run/never
exec 3<>/run/never

say() {
    echo "vmferry-study: $*"
}

nap() {
    read -r -t "$1" _ <&3
}

# The value that the command line has for KEY, or else DEFAULT, into the variable of that name.
parameter() { # KEY DEFAULT
    eval "$1=\$2"
    for word in $command_line; do
        case $word in
        "$1="*) eval "$1=\${word#*=}" ;;
        esac
    done
}

# Notes that a load has ended a round; the first time, that it begins to work. In the variable `load` is its name.
round() {
    rounds=$((${rounds:--1} + 1))
    echo "$rounds" >"/run/rounds/$load"
}

start() { # LOAD
    {
        (
            set -e
            load=$1
            "load_$1"
        ) >"/run/log/$1" 2>&1
        say "failed $1: $(tail -n 3 "/run/log/$1" | tr '\n' ' ')"
    } &
}

# Data that compresses as a system's files do: those of this guest, again and again.
corpus() { # MEBIBYTES FILE
    while :; do
        find /usr /lib /bin/busybox -type f -exec cat {} + || break
    done 2>/dev/null | dd bs=64k count=$(($1 * 16)) iflag=fullblock of="$2" 2>/dev/null
}

# --- the loads ---

# Strings of 512 bytes in memory. One client reads and one writes, both with keys drawn evenly; with hot_keys, another
# one writes to these keys alone.
load_redis() {
    parameter keys 200000
    parameter hot_keys 0
    redis-server --port 6379 --bind 127.0.0.1 --save '' --appendonly no --dir /tmp --daemonize yes
    until redis-cli ping 2>/dev/null | grep -q PONG; do nap 1 || :; done
    # The same names as the clients use. In pieces, since the server does nothing else during one.
    first=0
    while [ "$first" -lt "$keys" ]; do
        redis-cli --eval /usr/lib/study/fill.lua , "$first" $((first + 10000)) "$keys" >/dev/null
        first=$((first + 10000))
    done
    drive() { # TEST KEYS
        while :; do redis-benchmark -q -t "$1" -n 5000 -r "$2" -d 512 -c 16 -P 4 >/dev/null || return; done
    }
    drive get "$keys" &
    [ "$hot_keys" -eq 0 ] || drive set "$hot_keys" &
    round
    while :; do
        redis-benchmark -q -t set -n 5000 -r "$keys" -d 512 -c 16 -P 4 >/dev/null
        round
    done
}

# Transactions on a table of accounts with an index, and a history that is kept at a constant length. With a write-ahead
# log, as servers are set up.
load_sqlite() {
    parameter rows 200000
    database=/tmp/bank.db
    sqlite3 -batch "$database" ".parameter set :rows $rows" '.read /usr/lib/study/schema.sql' >/dev/null
    round
    while :; do
        echo '.read /usr/lib/study/transactions.sql'
    done | sqlite3 -batch -bail "$database" | while read -r _; do
        round
    done
    return 1
}

# A backup of files: compressed to a new file, which then replaces the one from before.
load_compress() {
    parameter compressor gzip
    parameter corpus_mib 64
    corpus "$corpus_mib" /tmp/files
    round
    while :; do
        # By its path: this shell has a lesser one of each built in, which it prefers.
        "/usr/bin/$compressor" -c </tmp/files >/tmp/backup.new
        mv /tmp/backup.new /tmp/backup
        round
    done
}

# A build: many sources with one header in common, two compilers at a time, and the objects joined at the end.
load_compile() {
    parameter sources 64
    mkdir /tmp/build
    cd /tmp/build
    awk -v sources="$sources" -f /usr/lib/study/sources.awk
    compile() { # FIRST
        number=$1
        while [ "$number" -lt "$sources" ]; do
            tcc -c "part$number.c" -o "part$number.o" || return
            number=$((number + 2))
        done
    }
    round
    while :; do
        compile 0 &
        other=$!
        compile 1
        wait "$other"
        tcc -r -o whole.o part*.o
        round
    done
}

# A job on data that does not fit the caches: see job.py.
load_python() {
    parameter store_mib 192
    python3.11 -S /usr/lib/study/job.py "$store_mib" | while read -r _; do
        round
    done
    return 1
}

# A server of files behind a cache that does not hold all of them, with an access log; both are the same nginx.
load_web() {
    parameter files_mib 48
    mkdir -p /tmp/web/files /tmp/web/cache /var/lib/nginx /var/log/nginx
    corpus "$files_mib" /tmp/web/corpus
    pages=$(python3.11 -S /usr/lib/study/pages.py /tmp/web/corpus /tmp/web/files)
    rm /tmp/web/corpus
    nginx -c /usr/lib/study/nginx.conf
    round
    while :; do
        wrk -t 1 -c 16 -d 5s -s /usr/lib/study/requests.lua http://127.0.0.1:8000/ -- "$pages" >/tmp/web/summary
        awk '/Non-2xx/ { wrong = 1; print } /Requests.sec/ { done = 1 } END { exit wrong || !done }' /tmp/web/summary
        # As a rotation of logs does, but at once: memory is all the disk there is.
        : >/tmp/web/access.log
        round
    done
}

# --- the workloads ---

command_line=$(cat /proc/cmdline)
parameter workload idle
case $workload in
idle) loads= ;;
redis | sqlite | compile | python | web) loads=$workload ;;
redis-hot) loads=redis ;;
gzip | xz) loads=compress ;;
mixed) loads='redis sqlite compress' ;;
*)
    say "failed init: there is no workload $workload"
    poweroff -f
    ;;
esac

for name in $loads; do start "$name"; done
for name in $loads; do
    until [ -e "/run/rounds/$name" ]; do nap 1; done
done
say "ready $workload"

parameter beat_s 1
beat=0
while :; do
    nap "$beat_s"
    beat=$((beat + 1))
    line=
    for name in $loads; do
        read -r count <"/run/rounds/$name"
        line="$line $name=$count"
    done
    say "beat $beat$line"
done
