"""The adapter store: revisions, pages, shared files, deletion at once, and tenants that never meet."""

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_adapters import LAYOUT, tensors_of
from small_store import SmallStore, open_small_store, small_file

from hueshift.adapters.errors import FailedPrecondition, Internal, InvalidArgument, NotFound, Reason
from hueshift.adapters.layout import BaseLayout
from hueshift.server.store.adapter_records import AdapterRecord


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SmallStore]:
    store = open_small_store(tmp_path)
    yield store
    store.check()
    store.database.close()


def ids(records: tuple[AdapterRecord, ...]) -> list[str]:
    return [record.adapter_id for record in records]


def test_a_published_adapter_is_found_and_loaded(store: SmallStore) -> None:
    adapter, data = small_file(0)
    revision = store.adapters.publish("acme", "fox", "The fox", {"team": "a"}, data, adapter, "job-1")
    record = store.adapters.get("acme", "fox")
    assert record.newest == revision == store.adapters.revision("acme", "fox")
    assert (record.display_name, record.labels, record.pinned) == ("The fox", {"team": "a"}, False)
    assert (revision.revision, revision.kind, revision.method) == (1, "spectral", "svdiff")
    assert (revision.identifier, revision.size_bytes, revision.job_id) == ("sks", len(data), "job-1")
    assert (record.created, record.updated, revision.created) == (1000.0, 1000.0, 1000.0)
    loaded = store.adapters.load(revision.content_hash, LAYOUT)
    assert tensors_of(loaded).keys() == tensors_of(adapter).keys()
    with store.adapters.open_file(revision.content_hash) as file:
        assert file.read() == data


def test_a_new_revision_keeps_the_earlier_ones(store: SmallStore) -> None:
    first = store.publish(seed=0)
    store.adapters.update("acme", "fox", display_name="Foxy", labels={"a": "b"})
    store.clock.now += 5
    second = store.publish(seed=1)
    assert (first.revision, second.revision) == (1, 2)
    assert store.adapters.revision("acme", "fox", 1) == first
    assert store.adapters.revision("acme", "fox") == second
    record = store.adapters.get("acme", "fox")
    assert (record.display_name, record.labels) == ("Foxy", {"a": "b"})
    assert (record.created, record.updated) == (1000.0, 1005.0)
    assert set(store.files()) == {first.content_hash, second.content_hash}
    adapter, data = small_file(2)
    store.adapters.publish("acme", "fox", "New name", {"c": "d"}, data, adapter)
    record = store.adapters.get("acme", "fox")
    assert (record.revision, record.display_name, record.labels) == (3, "New name", {"c": "d"})
    for number in (4, -1, 2**63, 10**30):
        with pytest.raises(NotFound, match="1 to 3") as caught:
            store.adapters.revision("acme", "fox", number)
        assert caught.value.reason is Reason.ADAPTER_REVISION_NOT_FOUND


def test_a_job_publishes_once(store: SmallStore) -> None:
    first = store.publish(seed=0, job_id="job-1")
    assert store.publish(seed=1, job_id="job-1") == first
    assert store.publish(seed=1, job_id="job-2").revision == 2
    assert len(store.files()) == 2
    assert store.temporaries() == []


def test_publishing_in_the_callers_transaction_stands_and_falls_with_it(store: SmallStore) -> None:
    adapter, data = small_file(0)

    def publish_and_fail() -> None:
        with store.database.write() as connection:
            store.adapters.publish("acme", "fox", "", {}, data, adapter, connection=connection)
            raise KeyError

    with pytest.raises(KeyError):
        publish_and_fail()
    with pytest.raises(NotFound):
        store.adapters.get("acme", "fox")
    with store.database.write() as connection:
        store.adapters.publish("acme", "fox", "", {}, data, adapter, connection=connection)
    assert store.adapters.get("acme", "fox").revision == 1


def test_deleting_frees_the_disk_at_once(store: SmallStore) -> None:
    sizes = [store.publish(seed=seed).size_bytes for seed in (0, 1)]
    hashes = set(store.files())
    deleted = store.adapters.delete("acme", "fox")
    assert (deleted.revisions, deleted.bytes, set(deleted.hashes)) == (2, sum(sizes), hashes)
    assert store.files() == {}
    with pytest.raises(NotFound):
        store.adapters.delete("acme", "fox")
    with pytest.raises(NotFound) as caught:
        store.adapters.load(deleted.hashes[0], LAYOUT)
    assert caught.value.reason is Reason.ADAPTER_DELETED
    assert store.publish(seed=1).revision == 1


def test_equal_content_is_one_file_until_the_last_owner_goes(store: SmallStore) -> None:
    revision = store.publish("acme", "fox")
    store.publish("acme", "fox")
    store.publish("acme", "wolf")
    store.publish("other", "fox")
    assert len(store.files()) == 1
    assert store.adapters.delete("acme", "fox").bytes == 0
    assert store.adapters.delete("acme", "wolf").bytes == 0
    store.adapters.load(revision.content_hash, LAYOUT)
    assert store.adapters.delete("other", "fox").bytes == revision.size_bytes
    assert store.files() == {}


def test_an_open_file_outlives_its_deletion(store: SmallStore) -> None:
    revision = store.publish()
    with store.adapters.open_file(revision.content_hash) as file:
        store.adapters.delete("acme", "fox")
        assert file.read() == small_file(0)[1]


def test_tenants_see_only_their_own(store: SmallStore) -> None:
    store.publish("acme", "fox", 0)
    store.publish("other", "fox", 1)
    assert (
        store.adapters.get("acme", "fox").newest.content_hash != store.adapters.get("other", "fox").newest.content_hash
    )
    store.adapters.delete("acme", "fox")
    assert ids(store.adapters.list("acme").adapters) == []
    assert ids(store.adapters.list("other").adapters) == ["fox"]
    for call in (store.adapters.get, store.adapters.delete, store.adapters.revision):
        with pytest.raises(NotFound, match="tenants/acme/adapters/fox") as caught:
            call("acme", "fox")
        assert caught.value.reason is Reason.ADAPTER_NOT_FOUND
    with pytest.raises(NotFound):
        store.adapters.update("acme", "fox", display_name="x")
    with pytest.raises(NotFound):
        store.adapters.set_pinned("acme", "fox", True)


def test_pages_are_stable_while_adapters_come_and_go(store: SmallStore) -> None:
    for n in range(10):
        # Pairs share a time: the id breaks the tie.
        store.clock.now = 1000.0 + n // 2
        store.publish(adapter_id=f"a{n}")
    expected = [f"a{n}" for n in reversed(range(10))]
    seen: list[str] = []
    token = ""
    while True:
        page = store.adapters.list("acme", 3, token)
        seen += ids(page.adapters)
        token = page.next_token
        if not token:
            break
        store.clock.now = 2000.0
        store.publish(adapter_id=f"new{len(seen)}")
        if "a5" in seen and "a1" not in seen and len(seen) == 6:
            store.adapters.delete("acme", "a5")
            store.adapters.delete("acme", "a2")
    assert seen == [name for name in expected if name != "a2"]
    assert ids(store.adapters.list("acme").adapters)[:2] == ["new6", "new3"]
    assert store.adapters.list("acme", 10).next_token == ""
    assert store.adapters.list("acme", 9).next_token != ""


def test_lists_filter_by_all_labels(store: SmallStore) -> None:
    adapter, data = small_file(0)
    labels = {"one": {"a": "1", "x.y/z-_": "q'\"$"}, "two": {"a": "1", "b": "2"}, "three": {"b": "1"}}
    for adapter_id, given in labels.items():
        store.adapters.publish("acme", adapter_id, "", given, data, adapter)
    for wanted, found in [
        ({}, {"one", "two", "three"}),
        ({"a": "1"}, {"one", "two"}),
        ({"a": "1", "b": "2"}, {"two"}),
        ({"x.y/z-_": "q'\"$"}, {"one"}),
        ({"a": "2"}, set()),
        ({"c": ""}, set()),
    ]:
        assert set(ids(store.adapters.list("acme", labels=wanted).adapters)) == found
    page = store.adapters.list("acme", 1, labels={"a": "1"})
    rest = store.adapters.list("acme", 1, page.next_token, {"a": "1"})
    assert {*ids(page.adapters), *ids(rest.adapters)} == {"one", "two"}


def test_wrong_pages_are_refused(store: SmallStore) -> None:
    for size in (-1, 501):
        with pytest.raises(InvalidArgument, match="page_size"):
            store.adapters.list("acme", size)
    inner = ['[1.0,2,"a"]', "null", '{"a":1,"b":2}', '["1","a"]', '[NaN,"a"]', "[" * 100, f'[{"9" * 150},"a"]']
    inner += ['[1.0,"\\ud800"]', '[1.0,"a\\u0000"]', '[1.0,["a"]]', '[1.0,""]', '[true,"a"]', '[1e999,"a"]']
    tokens = [base64.urlsafe_b64encode(text.encode()).decode() for text in inner]
    for token in [*tokens, "x", "é", "W" * 10000, base64.urlsafe_b64encode(b"[" * 99999).decode()]:
        with pytest.raises(InvalidArgument, match="page_token"):
            store.adapters.list("acme", 0, token)


def test_names_and_labels_have_limits(store: SmallStore) -> None:
    adapter, data = small_file(0)
    longest = {f"k{n}" + "x" * 55: "v" * 63 for n in range(16)}
    store.adapters.publish("acme", "fox", "n" * 120, longest, data, adapter)
    assert store.adapters.get("acme", "fox").labels == longest
    for name in ("n" * 121, "a\nb"):
        with pytest.raises(InvalidArgument, match="display_name"):
            store.adapters.update("acme", "fox", display_name=name)
    for labels, text in [
        ({f"k{n}": "" for n in range(17)}, "17 labels given; allowed: at most 16"),
        ({"k" * 64: ""}, "key 'k"),
        ({"": ""}, "key ''"),
        ({"a b": ""}, "key 'a b'"),
        ({"k": "v" * 64}, "64 characters"),
        ({"k": "a\x00b"}, "at most 63 printable"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            store.adapters.publish("acme", "fox", "", labels, data, adapter)
        with pytest.raises(InvalidArgument):
            store.adapters.list("acme", labels=labels)
    for adapter_id in ("", "Fox", "../x", "x" * 64):
        with pytest.raises(InvalidArgument, match="adapter_id"):
            store.adapters.publish("acme", adapter_id, "", {}, data, adapter)
    assert store.adapters.get("acme", "fox").revision == 1
    assert store.temporaries() == []


def test_updates_change_only_what_is_given(store: SmallStore) -> None:
    store.publish()
    store.clock.now = 2000.0
    assert store.adapters.update("acme", "fox", display_name="Foxy").labels == {}
    record = store.adapters.update("acme", "fox", labels={"a": "b"})
    assert (record.display_name, record.labels, record.updated) == ("Foxy", {"a": "b"}, 2000.0)
    assert store.adapters.update("acme", "fox", labels={}).labels == {}
    assert store.adapters.update("acme", "fox", display_name="").display_name == "fox"


def test_pins_are_remembered(store: SmallStore) -> None:
    store.publish("acme", "fox")
    store.publish("other", "wolf")
    assert store.adapters.set_pinned("acme", "fox", True).pinned
    assert ids(store.adapters.pinned()) == ["fox"]
    store.publish("acme", "fox", 1)
    assert store.adapters.get("acme", "fox").pinned
    assert not store.adapters.set_pinned("acme", "fox", False).pinned
    assert store.adapters.pinned() == ()


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_file_is_named_and_not_loaded(store: SmallStore, damage: str) -> None:
    revision = store.publish()
    file = store.blobs.path(revision.content_hash)
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    for call in (
        lambda: store.adapters.load(revision.content_hash, LAYOUT),
        lambda: store.adapters.open_file(revision.content_hash),
    ):
        with pytest.raises(Internal, match="damaged") as caught:
            call()
        assert caught.value.reason is Reason.STORE_DAMAGED
        assert revision.content_hash in caught.value.message
    # Storing it again heals it.
    assert store.publish().revision == 2
    store.adapters.load(revision.content_hash, LAYOUT)


def test_a_file_of_another_base_model_is_told_from_a_damaged_one(store: SmallStore) -> None:
    revision = store.publish()
    other = BaseLayout("cd" * 32, LAYOUT.matrices, LAYOUT.norms, LAYOUT.token_width)
    with pytest.raises(FailedPrecondition) as caught:
        store.adapters.load(revision.content_hash, other)
    assert caught.value.reason is Reason.ADAPTER_BASE_MISMATCH
    # The same hash over other layers cannot be, unless what we accept has changed.
    narrow = BaseLayout(LAYOUT.base_hash, LAYOUT.matrices[:1], LAYOUT.norms, LAYOUT.token_width)
    with pytest.raises(Internal, match="no longer passes validation"):
        store.adapters.load(revision.content_hash, narrow)


PUBLISH = """
import sys
from pathlib import Path
from small_store import open_small_store
store = open_small_store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(10):
    store.publish(adapter_id="shared", seed=n % 3)
    store.publish(adapter_id=f"own-{sys.argv[2]}", seed=n % 3)
    if n % 5 == 4:
        store.adapters.delete("acme", f"own-{sys.argv[2]}")
"""


def test_two_processes_publish_and_delete_at_once(store: SmallStore) -> None:
    support = str(Path(__file__).parents[2] / "support")
    code = f"import sys; sys.path.insert(0, {support!r})\n{PUBLISH}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(store.folder), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert store.adapters.get("acme", "shared").revision == 20
    assert ids(store.adapters.list("acme").adapters) == ["shared"]
    assert set(store.files()) == store.named()
    assert store.temporaries() == []
