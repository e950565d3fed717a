"""Encodes large data in worker processes into a file, once per node, and finds the file of an earlier run."""

import dataclasses
import glob
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from data.formats.records import Counts, Record, Tally
from data.sources import Part, Raw, all_raw, parse_raw
from utils.errors import Say, UserError
from utils.files import (
    atomic_folder,
    check_writable,
    disk_errors,
    read_json,
    remove,
    replace,
    sha256,
    write_json,
)
from utils.flags.data import RecordFlags
from utils.run.fingerprints import cache_folder, code_files, digest_of, known_sha256
from utils.watchdog import report_progress

CODE = ("data/", "reward/encode.py", "utils/tokenizer", "utils/llama_sentencepiece.py")  # that ids depend on
CHUNK = 512  # records that a worker gets at once
MAX_WORKERS = 32
INTERVAL = 10.0  # seconds between lines about the progress
ROWS, ABOUT = "rows.arrow", "about.json"
Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedFile:
    """Encoded records. usable: number of records that have rows or are only too long. rows: a list, or a file."""

    usable: int
    rows: list[dict[str, Any]] | str


def open_rows(encoded: EncodedFile) -> Sequence[dict[str, Any]]:
    """Returns the rows; those of a file are mapped into memory."""
    if isinstance(encoded.rows, list):
        return encoded.rows
    import datasets

    return datasets.Dataset.from_file(encoded.rows)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` items; the last one may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def encode_batch(records: list[Record], encoder, tally: Tally, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Returns (rows, number of usable records). Each row's column `record` numbers its usable record, from `start`."""
    usable = [made for made in encoder(records, tally) if made is not None]
    return [{**row, "record": i} for i, made in enumerate(usable, start) for row in made], len(usable)


def encode_to_file(parts: list[Part], encoder, tally: Tally, config: RecordFlags, say: Say) -> EncodedFile:
    """Returns the rows of the parts' records as a file of --data_cache, which is made if it is not there.

    Rows, their order and the counts added to `tally` do not depend on the number of workers. Raises UserError, and
    leaves nothing half-written.
    """
    for part in parts:
        next(part.raw(), None)  # a file of another kind is refused before all of it is hashed
    folder = os.path.join(folder_of(config), _key(parts, encoder))
    if (about := _about(folder)) is None:
        say(f"{encoder.what}: encoded once, into {folder} (--data_cache)")
        check_writable(folder, "--data_cache")
        _remove_leftovers(folder)
        own = f"{folder}.{socket.gethostname()}.{os.getpid()}"  # other nodes and runs may be making the same
        with atomic_folder(own, "--data_cache") as partial:
            about = _write(parts, encoder, config, say, os.path.join(partial, ROWS))
            write_json(os.path.join(partial, ABOUT), about)
        if _about(folder) is None:
            replace(own, folder)
        remove(own)
    else:
        say(f"{encoder.what}: encoded earlier, in {folder} (--data_cache)")
    tally.add_counts(about["counts"])
    return EncodedFile(about["usable"], os.path.join(folder, ROWS))


def _remove_leftovers(folder: str) -> None:
    """Removes what processes of this host that were killed have left of the same folder."""
    for path in glob.glob(f"{glob.escape(folder)}.{socket.gethostname()}.*"):
        number = path.removesuffix(".partial").rpartition(".")[2]
        if number.isdigit() and not os.path.exists(f"/proc/{number}"):
            remove(path)


def folder_of(config: RecordFlags) -> str:
    """Returns the folder of --data_cache. Raises UserError without the flag for a user who has no home."""
    if not config.data_cache and not cache_folder():
        raise UserError("--data_cache: this user has no home folder; pass a folder for encoded data")
    return os.path.abspath(config.data_cache or os.path.join(cache_folder(), "data"))


def _about(folder: str) -> dict | None:
    """Returns what an earlier run wrote about its file; None if it is not there, or not whole."""
    try:
        about = read_json(os.path.join(folder, ABOUT))
        whole = about["bytes"] == os.path.getsize(os.path.join(folder, ROWS))
        return about if whole and isinstance(about["usable"], int) and isinstance(about["counts"], dict) else None
    except (OSError, ValueError, KeyError):
        return None


def _key(parts: list[Part], encoder) -> str:
    """Returns a name for the rows: a digest of the data's content, the encoder, its tokenizer and the code."""
    import pyarrow
    import tokenizers
    import transformers

    given = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
    given["tokenizer"] = _tokenizer_digest(given["tokenizer"])
    code = {name: digest for name, digest in code_files().items() if name.startswith(CODE)}
    versions = [pyarrow.__version__, tokenizers.__version__, transformers.__version__]
    files = iter(known_sha256([part.name for part in parts if part.rows is None]))
    data = [(part.name, next(files) if part.rows is None else part.rows._fingerprint) for part in parts]
    options = json.dumps(given, default=dataclasses.asdict)
    return digest_of([type(encoder).__name__, encoder.columns, options, code, versions, data])[:32]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    if (model := getattr(tokenizer, "sp_model", None)) is not None:
        content = model.serialized_model_proto()
    elif tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str().encode()
    else:  # in Python: what is saved of it
        with tempfile.TemporaryDirectory() as folder:
            files = sorted(map(str, tokenizer.save_pretrained(folder)))
            content = json.dumps([sha256(file) for file in files if os.path.isfile(file)]).encode()
    added = sorted((i, token.__getstate__()) for i, token in tokenizer.added_tokens_decoder.items())
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, added]
    others = [str(tokenizer.chat_template), getattr(tokenizer, "chat_template_kwargs", {})]
    return digest_of([hashlib.sha256(content).hexdigest(), named, others])


def _write(parts: list[Part], encoder, config: RecordFlags, say: Say, file: str) -> dict:
    """Writes the rows to a file; returns what `_about` reads."""
    import pyarrow
    import pyarrow.compute

    schema = pyarrow.schema([(name, _type(kind)) for name, kind in {**encoder.columns, "record": "int64"}.items()])
    tally, usable, records, begin, told = Tally(encoder.what), 0, 0, time.monotonic(), time.monotonic()
    workers = config.data_workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    with disk_errors("--data_cache"), pyarrow.OSFile(file, "wb") as out, pyarrow.ipc.new_stream(out, schema) as writer:
        for chunk in _in_workers(batched(all_raw(parts), CHUNK), encoder, schema, workers):
            for batch in pyarrow.ipc.open_stream(chunk.rows):
                shifted = pyarrow.compute.add(batch.column("record"), usable)
                writer.write_batch(batch.set_column(batch.num_columns - 1, "record", shifted))
            usable, records = usable + chunk.usable, records + chunk.records
            tally.add_counts(chunk.counts)
            report_progress(f"encoding of {encoder.what}")
            if (now := time.monotonic()) - told > INTERVAL:
                told = now
                rate = records / (now - begin)
                say(f"{encoder.what}: {records:,} records encoded, {rate:,.0f} per second, {workers} processes")
    text = json.dumps(tally.counts(), ensure_ascii=False).encode(errors="replace")  # a column's name can be odd
    return {"usable": usable, "counts": json.loads(text), "bytes": os.path.getsize(file)}


@dataclass(frozen=True)
class _Chunk:
    rows: bytes  # as a stream of Arrow
    usable: int
    records: int
    counts: Counts


def _in_workers(chunks: Iterator[list[Raw]], encoder, schema, workers: int) -> Iterator[_Chunk]:
    """Yields the encoded chunks in order, a few at a time. The processes are no forks, since this one has threads."""
    context, given = multiprocessing.get_context("spawn"), (encoder, schema)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=given)
    try:
        waiting: deque[Future] = deque(pool.submit(_encode_chunk, chunk) for chunk in islice(chunks, 3 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_encode_chunk, chunk) for chunk in islice(chunks, 1))
            yield result
    except BrokenProcessPool as error:
        problem = "a process that encodes the data was killed, probably for lack of memory"
        raise UserError(f"{problem}; lower --data_workers {workers}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(encoder, schema) -> None:
    """Prepares a worker, which ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker.update(encoder=encoder, schema=schema)


def _encode_chunk(chunk: list[Raw]) -> _Chunk:
    import pyarrow

    encoder, schema = _worker["encoder"], _worker["schema"]
    tally = Tally(encoder.what)
    rows, usable = encode_batch([parse_raw(raw) for raw in chunk], encoder, tally)
    out = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(out, schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return _Chunk(out.getvalue().to_pybytes(), usable, len(chunk), tally.counts())


def _type(kind: str):
    """Returns Arrow's type of a name such as list<list<int32>>."""
    import pyarrow

    if kind.startswith("list<"):
        return pyarrow.list_(_type(kind[5:-1]))
    return pyarrow.type_for_alias(kind)
