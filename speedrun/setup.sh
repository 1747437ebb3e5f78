# Sourced, not run:  source speedrun/setup.sh [cache] [checkpoint] [--force] [--dry-run]
#
# Exports CACHE_DIR and CHECKPOINT of what is asked for, both or none, and puts the folder of the
# Python that has qat first in PATH where `python` is another. For bash 3.2 and newer and for zsh.
# It finds a Python and asks it: speedrun/install.py installs what is missing, `qat fetch` gets
# caches and checkpoints.

__qat_say() { printf '[SETUP] %s\n' "$*" >&2; }

# Print the first Python that is 3.11 or newer: one asked for, an active or own environment, others.
__qat_python() {
    local name
    for name in "${QAT_PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$1/.venv/bin/python" \
        python3 python python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 && "$name" -c '
import sys
sys.exit("too old" if sys.version_info < (3, 11) else print(sys.executable))' 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

# Print one value of a line of JSON: Python, line, key. A path that is not absolute is one from $4.
__qat_value() {
    printf '%s' "$2" | "$1" -c '
import json, os, sys
value = json.load(sys.stdin).get(sys.argv[1])
print(value and os.path.join(sys.argv[2], value) or "")' "$3" "$4"
}

__qat_setup() {
    if [ -n "${ZSH_VERSION:-}" ]; then emulate -L sh; fi
    local root="$1" word python answer from cache checkpoint
    local dry="" fetched=0
    shift
    if [ -z "$root" ]; then
        __qat_say "error: cannot find speedrun/setup.sh itself; cd to the checkout and source it there"
        return 2
    fi
    for word in "$@"; do
        case "$word" in
        --dry-run) dry=--dry-run ;;
        --force) ;;
        -*)
            __qat_say "error: unknown flag $word; use: source speedrun/setup.sh [cache] [checkpoint] [--force] [--dry-run]"
            return 2
            ;;
        ?*) fetched=$((fetched + 1)) ;;
        esac
    done
    if ! python=$(__qat_python "$root"); then
        __qat_say "error: no Python 3.11 or newer found; install one, or set QAT_PYTHON to its path"
        return 2
    fi
    __qat_say "Python: $python"
    if ! python=$("$python" "$root/speedrun/install.py" $dry); then
        __qat_say "error: the installation failed; nothing is set. Fix what is named above and run it again"
        return 2
    fi
    if [ -z "$dry" ]; then __qat_path "$python"; fi
    if [ "$fetched" -eq 0 ]; then
        __qat_say "no cache or checkpoint asked for; try: source speedrun/setup.sh L64 q4_fp32"
        return 0
    fi
    # The flags of setup are flags of fetch. Relative paths of stores are meant from here.
    if ! answer=$(__qat_fetch "$python" "$root" "$@"); then
        __qat_say "CACHE_DIR and CHECKPOINT stay as they were; fix what is named above and run it again"
        return 2
    fi
    from="$root"
    if [ "$PWD" -ef "$root" ]; then from=""; fi
    cache=$(__qat_value "$python" "$answer" cache "$from") || return 2
    checkpoint=$(__qat_value "$python" "$answer" checkpoint "$from") || return 2
    if [ -n "$dry" ]; then
        __qat_say "would set CACHE_DIR=$cache CHECKPOINT=$checkpoint"
        return 0
    fi
    if [ -n "$cache" ]; then
        export CACHE_DIR="$cache"
        __qat_say "CACHE_DIR=$CACHE_DIR"
    fi
    if [ -n "$checkpoint" ]; then
        export CHECKPOINT="$checkpoint"
        __qat_say "CHECKPOINT=$CHECKPOINT"
    fi
}

# Let `python` be the one that has qat, where it is another: an own environment is not active yet.
__qat_path() {
    local folder="${1%/*}"
    if [ "$(python -c 'import sys; print(sys.executable.rpartition("/")[0])' 2>/dev/null)" = "$folder" ]; then
        return 0
    fi
    if [ -x "$folder/python" ]; then
        export PATH="$folder:$PATH"
        __qat_say "python is now $folder/python"
    else
        __qat_say "use $1 where a command says python"
    fi
}

# Run `qat fetch` in the checkout, in a shell of its own: Python, checkout, names and flags.
__qat_fetch() (
    python="$1" root="$2"
    shift 2
    case "${QAT_STORE:-}" in
    "" | /* | *://* | "~"*) ;;
    *) QAT_STORE="$PWD/$QAT_STORE" && export QAT_STORE ;;
    esac
    cd "$root" || exit 2
    "$python" -m qat fetch "$@"
)

# Print the checkout, from this file's own path: its argument.
__qat_root() (
    case "$1" in */*) ;; *) set -- "./$1" ;; esac
    CDPATH='' cd "${1%/*}/.." >/dev/null 2>&1 && pwd
)

# Remove what this file defines and give back the code: what stays are the two variables and PATH.
__qat_end() {
    unset -f __qat_say __qat_python __qat_value __qat_setup __qat_fetch __qat_path \
        __qat_root __qat_end
    unset __qat_file
    return "$1"
}

__qat_file=""
if [ -n "${ZSH_VERSION:-}" ]; then
    # shellcheck disable=SC2154  # zsh's syntax, which bash never reads
    case "${ZSH_EVAL_CONTEXT:-file}" in *file*) eval '__qat_file="${(%):-%x}"' ;; esac
elif [ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE:-}" != "$0" ]; then
    __qat_file="${BASH_SOURCE:-}"
fi
if [ -n "$__qat_file" ]; then
    __qat_setup "$(__qat_root "$__qat_file")" "$@" && __qat_end 0 || __qat_end $?
else
    __qat_say 'error: source it in bash or zsh, so that it can set variables there: source speedrun/setup.sh L64 q4_fp32'
    __qat_end 2
fi
