"""What may stand for something learned in a prompt."""

from hueshift.adapters.container import TensorEntry, invalid

MAX_WORD = 64


def check_word(word: str) -> str | None:
    """Return what is wrong with a placeholder word, None if nothing: 1 to 64 printable characters without spaces."""
    if not 1 <= len(word) <= MAX_WORD:
        return f"{word[:MAX_WORD]!r} has {len(word)} characters; allowed: 1 to {MAX_WORD}"
    if not word.isprintable() or any(letter.isspace() for letter in word):
        return f"{word!r} holds a space or a character that cannot be printed"
    return None


def check_class_noun(noun: str) -> bool:
    """Return whether that may be the class noun of an adapter: empty, or up to 64 printable characters, trimmed."""
    return len(noun) <= MAX_WORD and noun.isprintable() and noun == noun.strip()


def checked_word(entry: TensorEntry, word: str) -> str:
    """Return the word of a tensor. Raises InvalidArgument (ADAPTER_FILE_INVALID) if it cannot be one."""
    problem = check_word(word)
    if problem:
        raise invalid(f"tensor {entry.name!r}: the word {problem}")
    return word
