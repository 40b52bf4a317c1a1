# Sourced by the other scripts: private clusters that belong to user postgres when we are root, else to ourselves.

PG_CONFIG=${PG_CONFIG:-pg_config}
export PG_CONFIG
pg_bindir() { "$PG_CONFIG" --bindir; }

# Runs a command as the user that may run PostgreSQL.
as_postgres() {
    if [ "$(id -u)" -eq 0 ]; then
        setpriv --reuid postgres --regid postgres --init-groups "$@"
    else
        "$@"
    fi
}

# A command that installs into PostgreSQL's directories.
as_root() {
    if [ "$(id -u)" -eq 0 ] || [ -w "$("$PG_CONFIG" --pkglibdir)" ]; then
        "$@"
    else
        sudo ${CARGO_TARGET_DIR:+env CARGO_TARGET_DIR="$CARGO_TARGET_DIR"} "$@" # sudo empties the environment
    fi
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# cluster_create DIR PGPORT [line of postgresql.conf …]
cluster_create() {
    local dir=$1 port=$2 line
    shift 2
    mkdir -p "$dir"
    [ "$(id -u)" -ne 0 ] || chown postgres "$dir"
    as_postgres test -x "$dir" || { echo "imbus: user postgres cannot enter $dir" >&2; return 1; }
    as_postgres "$(pg_bindir)/initdb" -D "$dir/data" -U postgres -A trust -E UTF8 --no-sync >"$dir/initdb.log" 2>&1 ||
        { cat "$dir/initdb.log" >&2; return 1; }
    for line in "port = $port" "listen_addresses = '127.0.0.1'" "unix_socket_directories = '$dir'" "$@"; do
        echo "$line" | as_postgres tee -a "$dir/data/postgresql.conf" >/dev/null
    done
}

cluster_start() {
    (cd "$1" && as_postgres "$(pg_bindir)/pg_ctl" -D "$1/data" -l "$1/log" -w -t 60 start >/dev/null) ||
        { tail -n 30 "$1/log" >&2; return 1; }
}

# By the pid in postmaster.pid; quiet when nothing runs. After a reboot that pid may belong to somebody else: a
# postmaster is known by its working directory.
cluster_stop() {
    local pid
    pid=$(as_postgres head -n 1 "$1/data/postmaster.pid" 2>/dev/null) || return 0
    [ "$(as_postgres readlink "/proc/$pid/cwd" 2>/dev/null)" = "$(realpath "$1/data")" ] || return 0
    (cd "$1" && as_postgres "$(pg_bindir)/pg_ctl" -D "$1/data" -m fast -w -t 60 stop >/dev/null 2>&1) || true
}
