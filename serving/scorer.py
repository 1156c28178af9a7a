"""Debiased scores from a model bundle: numpy only, the one implementation that training, evaluation and serving share.

A bundle holds two models of one form (`components.cllmr.linear.scores`): the factual one, and the counterfactual one, which is
the same without the text's propensity. Whatever the formulation (`components.cllmr.effects`), with F and C their scores:

    factual   TE_ui   = F_ui
    direct    NDE_ui  = F_ui - C_ui
    indirect  TNIE_ui = C_ui
    debiased  y_ui    = TE_ui - λ NDE_ui = (1 - λ) F_ui + λ C_ui

So a debiased score has the form of the others: an inner product and weights from the user's items.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from components.artifacts import Manifest, Store
from components.cllmr.linear.compact import CompactItems, ItemStorage
from components.cllmr.linear.scores import LinearScores, from_tensors, mixed, products, standardised
from components.errors import ArtifactError, ConfigError, did_you_mean, first_line
from components.ids import UNKNOWN, Vocabulary
from serving.ranking import Candidates, Floats, Matching, Ranking, Rows, top_k

SCHEMA_VERSION = 2
GOLDEN_TOLERANCE = 1e-5  # float32 sums over some hundred terms differ by the order of summation: about 1e-6 of the largest term

BUNDLE_DIRECTORY = "bundle"
MODEL_FILE = "model.safetensors"
BUNDLE_FILE = "bundle.json"
USERS_FILE = "users.json"
ITEMS_FILE = "items.json"
GOLDEN_FILE = "golden.json"
TEXT_FILE = "text.safetensors"
"""Texts of the items, for items that are new: not read until one is asked for."""

NEWCOMERS_FILE = "newcomers.safetensors"
"""How a user's own text alone is answered; absent where users have none, or popularity does as well."""

ATTRIBUTES_FILE = "attributes.parquet"
"""What items can be filtered by: see serving.attributes."""

WEIGHT_PRODUCTS, BLOCK_PRODUCTS, SCORE_PRODUCTS = 32, 1 << 20, 64
"""Products that take as long as one weight between items, and, where items come on top of the training data, as a block of
weights and as each of its scores, which are summed and standardised; measured."""

_ROWS_AT_ONCE = 65_536

_REBUILD = "Build it again: cllmr run --from train"

_Json = TypeVar("_Json", dict[str, Any], list[Any])

Effect = Literal["debiased", "factual", "direct"]


class Effects(NamedTuple):
    """Effects of one user and several items, float64, each of shape (num_pairs,); total = direct + indirect."""

    total: npt.NDArray[np.float64]
    """TE: the factual score."""
    direct: npt.NDArray[np.float64]
    """NDE: what the side information's propensity adds by itself."""
    indirect: npt.NDArray[np.float64]
    """TNIE = TE - NDE: the match with taste."""
    debiased: npt.NDArray[np.float64]
    """TE - λ NDE."""


class Scorer:
    """Scores, rankings and effects of one bundle.

    Args:
        model: tensors of the bundle, checked by `load`.
        bundle: contents of bundle.json.
        user_ids: user_id by row.
        items: item_id, title and profile by row.
        golden: recorded requests with their answers.
        models: the factual and the counterfactual model of `model`, where they have been made already.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        bundle: dict[str, Any],
        user_ids: Sequence[str],
        items: Sequence[dict[str, Any]],
        golden: Sequence[dict[str, Any]] = (),
        models: tuple[LinearScores, LinearScores] | None = None,
    ) -> None:
        self.bundle = bundle
        self.name = str(bundle["name"])
        self.fingerprint = str(bundle["fingerprint"])
        self.debias_strength = float(bundle["debias_strength"])
        self.user_vocabulary = Vocabulary(user_ids)
        self.item_vocabulary = Vocabulary([item["item_id"] for item in items])
        self.titles = [str(item["title"]) for item in items]
        self.profiles = [str(item.get("profile") or "") for item in items]
        self.propensity: Floats = model["propensity"]  # (num_items,)
        self.popularity: Rows = model["popularity"]  # (num_items,)
        self.factual, self.counterfactual = models_of(model) if models is None else models
        self.num_users, self.num_items = len(self.factual.users), len(self.factual.items)
        self._blocks = {name: [float(weight) for _, weight in blocks] for name, blocks in bundle["history_blocks"].items()}
        self._popularity_weight = float(bundle.get("members", {}).get("popularity", 0.0))
        self._vectors: Floats | CompactItems = model["item_vectors"]  # (num_items, v)
        starts = range(0, self.num_items, _ROWS_AT_ONCE)
        self._lengths: Floats = np.concatenate([np.linalg.norm(self._vectors[n : n + _ROWS_AT_ONCE], axis=1) for n in starts])
        self._seen_indptr: Rows = model["seen_indptr"]
        self._seen_items: npt.NDArray[np.int32] = model["seen_items"]
        self._golden = list(golden)
        # the score that nearly everybody asks for, as one model; a third matrix is too much where two are compact
        one_model = not isinstance(self.factual.items, CompactItems) or self.debias_strength in (0.0, 1.0)
        self.debiased = mixed(self.factual, self.counterfactual, self.debias_strength) if one_model else None

    @classmethod
    def load(cls, bundle_dir: str | Path, storage: ItemStorage = "float32") -> "Scorer":
        """Reads and checks a bundle; golden requests are replayed by `replay_golden`, not here.

        Args:
            bundle_dir: the bundle.
            storage: of the item vectors in memory; the rest stays as it is.

        Raises:
            ArtifactError: a file is missing or unreadable, the schema is of another version, or shapes, ranges or
                vocabularies do not fit together.
        """
        directory = Path(bundle_dir)
        bundle = _read_json(directory / BUNDLE_FILE, dict)
        _check_header(bundle, directory / BUNDLE_FILE)
        user_ids = _read_json(directory / USERS_FILE, list)
        items = _read_json(directory / ITEMS_FILE, list)
        golden = _read_json(directory / GOLDEN_FILE, list) if (directory / GOLDEN_FILE).exists() else []
        path = directory / MODEL_FILE
        try:
            model = _read_model(path, storage)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(path, f"cannot be read: {first_line(error)}") from None
        models = _check_model(model, path)
        _check_blocks(bundle["history_blocks"], models, directory / BUNDLE_FILE)
        _check_ids(user_ids, len(model["factual.users"]), directory / USERS_FILE)
        _check_items(items, len(model["factual.items"]), directory / ITEMS_FILE)
        return cls(model, bundle, user_ids, items, golden, models)

    # -- scores ---------------------------------------------------------------------------------------------------------

    def score_all(self, users: Rows, debias: float | None = None, effect: Effect = "debiased") -> Floats:
        """Scores of some users with all items.

        Args:
            users: user rows, (num_asked,).
            debias: λ in [0, 1]; the bundle's own when None. Only the debiased effect depends on it.
            effect: which score, see this module's docstring.

        Returns:
            float32, (num_asked, num_items).

        Raises:
            ConfigError: λ outside [0, 1], or an unknown effect.
        """
        strength = self._strength(debias)
        if effect == "factual" or (effect == "debiased" and strength == 0.0):
            return self.factual.score(users)
        if effect == "debiased" and strength == self.debias_strength and self.debiased is not None:
            return self.debiased.score(users)
        if effect not in get_args(Effect):
            raise ConfigError(f"unknown effect '{effect}'.", did_you_mean(effect, get_args(Effect)))
        factual, counterfactual = self.factual.score(users), self.counterfactual.score(users)
        if effect == "direct":
            return factual - counterfactual
        return np.float32(1 - strength) * factual + np.float32(strength) * counterfactual

    def effects(self, user: int, items: npt.ArrayLike, debias: float | None = None, recent: npt.ArrayLike = ()) -> Effects:
        """Effects of one user's pairs, in double precision (E13-E16).

        Args:
            user: user row.
            items: item rows, (num_pairs,) or a single one.
            debias: λ in [0, 1]; the bundle's own when None.
            recent: item rows, see `score_users`.
        """
        rows = np.atleast_1d(np.asarray(items, dtype=np.int64))
        total, indirect = (model.pairs(user, rows) for model in (self.factual, self.counterfactual))
        if (new := self._new(user, recent)).size:
            total, indirect = total + self.factual.added(user, new)[rows], indirect + self.counterfactual.added(user, new)[rows]
        direct = total - indirect
        return Effects(total, direct, indirect, total - self._strength(debias) * direct)

    def bound(self, users: Rows, debias: float | None = None) -> npt.NDArray[np.float64]:
        """How far off scores of some users can be because of compact items, (num_asked,); 0 where they are float32."""
        strength = self._strength(debias)
        total = np.zeros(len(users))
        for model, share in ((self.factual, 1 - strength), (self.counterfactual, strength)):
            if isinstance(model.items, CompactItems) and share:
                total += share * model.items.bound(model.users[users])
        return total

    @property
    def products_per_user(self) -> int:
        """How many numbers are multiplied to score all items for one user, weights between items aside."""
        return int(self.num_items * self.factual.users.shape[1])

    def history_products(self, user: int, further: int, debias: float) -> int:
        """How many products take as long as the weights between items do, each item of a history having as many as the average.

        Args:
            user: user row, whose training interactions count; `UNKNOWN`: nobody's do.
            further: items of the history beside these.
            debias: λ in [0, 1].
        """
        items = further if user == UNKNOWN else further + int(self._seen_indptr[user + 1] - self._seen_indptr[user])
        total = 0
        for model, share in ((self.factual, 1 - debias), (self.counterfactual, debias)):
            if share:
                total += WEIGHT_PRODUCTS * items * model.weights.nnz // self.num_items
            if share and further:
                each = SCORE_PRODUCTS if model.folds is None else SCORE_PRODUCTS + model.folds.shape[1]
                total += model.weights.shape[0] // self.num_items * (BLOCK_PRODUCTS + self.num_items * each)
        return total

    @property
    def folds_in(self) -> bool:
        """Whether somebody who is not in the training data can be answered from his history."""
        return bool(self._blocks["factual"])

    def fold_in(self, items: npt.ArrayLike, debias: float | None = None) -> Floats:
        """Scores of somebody without a row here, from his history, by the members that need nothing else: (num_items,).

        Args:
            items: history, item rows; `UNKNOWN` is ignored. Without any known item all scores are those of popularity.
            debias: λ in [0, 1]; the bundle's own when None.
        """
        history, strength = _known(items), self._strength(debias)
        models = {"factual": (self.factual, 1 - strength), "counterfactual": (self.counterfactual, strength)}
        total = self._popularity_weight * standardised(np.log1p(self.popularity)[None])[0]
        for name, (model, share) in models.items():
            if share:
                total = total + np.float32(share) * model.folded(self._blocks[name], history)
        return np.asarray(total, dtype=np.float32)

    def score_user(self, user: int, debias: float | None = None, recent: npt.ArrayLike = ()) -> Floats:
        """`score_users` of one: (num_items,)."""
        return self.score_users(np.array([user]), debias, [recent])[0]

    def score_users(self, users: Rows, debias: float | None = None, recent: Sequence[npt.ArrayLike] = ()) -> Floats:
        """Scores of some users with all items, their histories with some items more than the training data knew.

        Args:
            users: user rows, (num_asked,).
            debias: λ in [0, 1]; the bundle's own when None.
            recent: item rows of each user, or nothing at all; those of the training data and `UNKNOWN` are ignored.

        Returns:
            float32, (num_asked, num_items).
        """
        scores, strength = self.score_all(users, debias), np.float32(self._strength(debias))
        shares = ((self.factual, 1 - strength), (self.counterfactual, strength))
        for place, (user, items) in enumerate(zip(users.tolist(), recent, strict=False)):
            if (new := self._new(user, items)).size:
                for model, share in shares:
                    if share:
                        scores[place] += share * model.added(user, new)
        return scores

    def _new(self, user: int, recent: npt.ArrayLike) -> Rows:
        """Those of some item rows that a user's training interactions lack."""
        return np.setdiff1d(_known(recent), self.seen(user)) if np.size(recent) else np.empty(0, dtype=np.int64)

    # -- rankings -------------------------------------------------------------------------------------------------------

    def recommend(
        self,
        user: int,
        k: int,
        debias: float | None = None,
        exclude: npt.ArrayLike = (),
        allow: npt.ArrayLike | None = None,
        deny: npt.ArrayLike = (),
    ) -> Ranking:
        """The k best items of one user, exact; equal scores rank by item row.

        Args:
            user: user row.
            k: items wanted; fewer come back when fewer are candidates.
            debias: λ in [0, 1]; the bundle's own when None, 0 for the factual ranking.
            exclude: item rows that are no candidates (already seen); `UNKNOWN` is ignored, here and below.
            allow: item rows that alone are candidates; None means all.
            deny: item rows that are no candidates.
        """
        scores = self.score_all(np.array([user]), debias)[0]
        return top_k(scores, k, self.candidates(exclude, allow, deny))

    def candidates(
        self,
        exclude: npt.ArrayLike = (),
        allow: npt.ArrayLike | None = None,
        deny: npt.ArrayLike = (),
        matching: Matching | None = None,
    ) -> Candidates:
        """Which items may be ranked."""
        excluded = np.concatenate((_known(exclude), _known(deny)))
        return Candidates(self.num_items, excluded, None if allow is None else _known(allow), matching)

    def user(self, user_id: str) -> int:
        """Row of a user who has training interactions; `UNKNOWN` for anybody else: the row of a user without says nothing."""
        row = self.user_vocabulary.row(user_id)
        return row if row != UNKNOWN and self._seen_indptr[row] < self._seen_indptr[row + 1] else UNKNOWN

    def seen(self, user: int) -> Rows:
        """Item rows of a user's training interactions."""
        return self._seen_items[self._seen_indptr[user] : self._seen_indptr[user + 1]].astype(np.int64)

    def similar_items(self, item: int, k: int, among: npt.ArrayLike | None = None) -> Ranking:
        """The items nearest to one by cosine of the bundle's item vectors.

        Args:
            item: item row; never among its own neighbours.
            k: neighbours wanted.
            among: item rows to choose from, for example what a user liked; None means all.
        """
        lengths = np.maximum(self._lengths * self._lengths[item], np.finfo(np.float32).tiny)
        cosines = products(self._vectors[[item]], self._vectors)[0] / lengths
        return top_k(cosines, k, self.candidates(exclude=[item], allow=among))

    # -- golden requests ------------------------------------------------------------------------------------------------

    def replay_golden(self, tolerance: float = GOLDEN_TOLERANCE) -> int:
        """Asks the bundle's recorded requests again; returns how many there were.

        A recorded item may change places with another of the same score (to `tolerance`): sums differ in the last bit
        between machines. Compact items may be off by their bound as well, and no further.

        Raises:
            ArtifactError: there are no golden requests, or an answer differs.
        """
        if not self._golden:
            raise ArtifactError(f"bundle {self.fingerprint} has no golden requests ({GOLDEN_FILE}).", _REBUILD)
        for number, entry in enumerate(self._golden):
            if problem := self._golden_problem(entry, tolerance):
                raise ArtifactError(f"golden request {number} of bundle {self.fingerprint}: {problem}.", _REBUILD)
        return len(self._golden)

    def _golden_problem(self, entry: dict[str, Any], tolerance: float) -> str:
        """What is wrong with the answer to one recorded request, "" when nothing."""
        try:
            request, items = entry["request"], list(entry["items"])
            expected = np.asarray(entry["scores"], dtype=np.float64)
            user_id, k, debias = str(request["user_id"]), int(request["k"]), float(request["debias"])
        except (KeyError, TypeError, ValueError) as error:
            return f"cannot be read: {error!r}"
        user, rows = self.user_vocabulary.row(user_id), self.item_vocabulary.rows(items)
        if user == UNKNOWN or (rows == UNKNOWN).any():
            return "asks for a user or an item that is not in the bundle"
        answer = self.recommend(user, k, debias, exclude=self.seen(user))
        if len(answer.rows) != len(items) or len(expected) != len(items):
            return f"{len(answer.rows)} items ranked, {len(items)} recorded with {len(expected)} scores"
        own = self.score_all(np.array([user]), debias)[0][rows]
        off = tolerance + self.bound(np.array([user]), debias)[0]
        for what, scores in (("scores", own), ("ranking", answer.scores)):
            if not np.allclose(scores, expected, rtol=tolerance, atol=off):
                worst = int(np.argmax(np.abs(scores - expected)))
                return f"{what} differ at place {worst + 1}: {scores[worst]:.7g}, recorded {expected[worst]:.7g}"
        return ""

    def _strength(self, debias: float | None) -> float:
        strength = self.debias_strength if debias is None else float(debias)
        if not 0.0 <= strength <= 1.0:  # also refuses NaN
            raise ConfigError(f"debias = {debias!r} is not allowed.", "Give a number from 0 (factual) to 1 (fully debiased).")
        return strength


def find_trained(storage_root: str, fingerprint: str) -> Manifest:
    """The train artifact of a model.

    Raises ArtifactError when it is not there, StorageError when the store does not say.
    """
    manifest = Store(storage_root).find("train", fingerprint)
    if manifest is None:
        raise ArtifactError(
            f"train artifact {fingerprint} is not below '{storage_root}'.",
            f"If that was renamed or is mounted elsewhere: cllmr promote {fingerprint} --storage WHERE. "
            "Else build it again: cllmr run --from train",
        )
    return manifest


def find_bundle(storage_root: str, fingerprint: str) -> Path:
    """The bundle of a train artifact as a local directory, fetched and checked against its manifest.

    Raises ArtifactError when it is not there or damaged, StorageError when the store does not say.
    """
    return find_trained(storage_root, fingerprint).path(BUNDLE_DIRECTORY) / BUNDLE_DIRECTORY


def make_golden(scorer: Scorer, num_users: int = 8, k: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Requests with their answers for golden.json: a few users, at the bundle's own λ, at 0 and at 1 in turn.

    Args:
        scorer: of the bundle that the requests will lie in.
        num_users: users asked for, all where there are fewer.
        k: items each.
        seed: chooses the users.
    """
    count = min(num_users, scorer.num_users)
    users = np.sort(np.random.default_rng(seed).choice(scorer.num_users, size=count, replace=False))
    strengths = (scorer.debias_strength, 0.0, 1.0)
    entries = []
    for number, user in enumerate(users.tolist()):
        debias = strengths[number % len(strengths)]
        ranking = scorer.recommend(user, k, debias, exclude=scorer.seen(user))
        entries.append(
            {
                "request": {"user_id": scorer.user_vocabulary.ids[user], "k": k, "debias": debias},
                "items": [scorer.item_vocabulary.ids[row] for row in ranking.rows.tolist()],
                "scores": [float(score) for score in ranking.scores],
            }
        )
    return entries


def models_of(model: Mapping[str, Any]) -> tuple[LinearScores, LinearScores]:
    """The factual and the counterfactual model; parts that the file holds once are shared.

    Raises:
        ValueError: tensors are missing or do not fit together.
    """
    factual = from_tensors(model, "factual")
    names = [name for name in model if name.startswith("counterfactual.")]
    if not names:
        return factual, factual
    own = {f"counterfactual.{name.removeprefix('factual.')}": model[name] for name in model if name.startswith("factual.")}
    counterfactual = from_tensors({**own, **{name: model[name] for name in names}}, "counterfactual")
    if "counterfactual.users" not in names:
        counterfactual = replace(counterfactual, users=factual.users)
    if "counterfactual.history.data" not in names:
        counterfactual = replace(counterfactual, history=factual.history)
    return factual, counterfactual


# -- checks -----------------------------------------------------------------------------------------------------------


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} {what}.", _REBUILD)


def _known(rows: npt.ArrayLike) -> Rows:
    array = np.asarray(rows, dtype=np.int64)
    return array[array != UNKNOWN]


def _read_model(path: Path, storage: ItemStorage) -> dict[str, Any]:
    """The tensors; item vectors as they are to be stored."""
    if storage == "float32":
        return dict(load_file(path))
    model: dict[str, Any] = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            part: Any = file.get_slice(name)
            if (name.endswith(".items") or name == "item_vectors") and part.get_dtype() == "F32" and len(part.get_shape()) == 2:
                model[name] = CompactItems.of(partial(_slice, part), part.get_shape(), storage)
            else:
                model[name] = file.get_tensor(name)
    return model


def _slice(part: Any, start: int, stop: int) -> Floats:
    rows: Floats = part[start:stop]
    return rows


def _read_json(path: Path, kind: type[_Json]) -> _Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read: {first_line(error)}") from None
    if not isinstance(value, kind):
        raise _damaged(path, f"holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _check_header(bundle: dict[str, Any], path: Path) -> None:
    if (version := bundle.get("schema_version")) != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version is {version!r}, this version of the platform reads {SCHEMA_VERSION}.",
            "Serve the bundle with the cllmr-platform that built it, or build it again: cllmr run --from train",
        )
    wanted: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "fingerprint": str,
        "embedding_dim": (int,),
        "debias_strength": (int, float),
        "effect": str,
        "history_blocks": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(bundle.get(key), kind):
            raise _damaged(path, f"has {key} = {bundle.get(key)!r}")
    if not 0.0 <= bundle["debias_strength"] <= 1.0:
        raise _damaged(path, f"has debias_strength = {bundle['debias_strength']!r}, allowed are 0 to 1")


def _check_model(model: Mapping[str, Any], path: Path) -> tuple[LinearScores, LinearScores]:
    """The factual and the counterfactual model; refuses tensors of wrong type or shape, NaN, or a broken interaction list."""
    try:
        factual, counterfactual = models_of(model)
    except ValueError as error:
        raise _damaged(path, f"does not fit together: {error}") from None
    users, items = len(factual.users), len(factual.items)
    if (users, items) != (len(counterfactual.users), len(counterfactual.items)):
        raise _damaged(
            path, f"has a counterfactual model of {len(counterfactual.users)} users, {len(counterfactual.items)} items"
        )
    if users == 0 or items == 0:
        raise _damaged(path, f"holds {users} users and {items} items")
    wanted = {"propensity": "float32", "item_vectors": "float32", "popularity": "int64", "seen_indptr": "int64"}
    if missing := [name for name in [*wanted, "seen_items"] if name not in model]:
        raise _damaged(path, f"lacks {', '.join(missing)}")
    indptr, vectors = model["seen_indptr"], model["item_vectors"]
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "propensity": ((items,), "float32"),
        "item_vectors": ((items, vectors.shape[-1] if vectors.ndim else 0), "float32"),
        "popularity": ((items,), "int64"),
        "seen_indptr": ((users + 1,), "int64"),
        "seen_items": ((int(indptr[-1]) if indptr.size else 0,), "int32"),
    }
    for name, (shape, dtype) in expected.items():
        tensor = model[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise _damaged(path, f"has {name} of shape {tensor.shape} and type {tensor.dtype}, expected {shape} and {dtype}")
        if dtype == "float32" and isinstance(tensor, np.ndarray) and not np.isfinite(tensor).all():
            raise _damaged(path, f"has {int((~np.isfinite(tensor)).sum())} values in {name} that are not finite")
    if model["propensity"].min() < 0.0:
        raise _damaged(path, f"has propensities from {model['propensity'].min():.4g}, allowed are 0 and more")
    seen = model["seen_items"]
    if indptr[0] != 0 or (np.diff(indptr) < 0).any() or (seen.size and (seen.min() < 0 or seen.max() >= items)):
        raise _damaged(path, "has a list of seen items that is not in order or names items that do not exist")
    if model["popularity"].min() < 0:
        raise _damaged(path, f"has a negative popularity ({model['popularity'].min()})")
    return factual, counterfactual


def _check_blocks(blocks: dict[str, Any], models: tuple[LinearScores, LinearScores], path: Path) -> None:
    """Refuses members of a history that are not those of the weights between items."""
    for name, model in zip(("factual", "counterfactual"), models, strict=True):
        rows, items = model.weights.shape
        try:
            weights = [float(weight) for _, weight in blocks[name]]
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"has history_blocks = {blocks!r}") from None
        if len(weights) * items != rows:
            raise _damaged(path, f"has {len(weights)} {name} history_blocks of {items} items for {rows} rows of weights")


def _check_ids(ids: list[Any], count: int, path: Path) -> None:
    if len(ids) != count:
        raise _damaged(path, f"holds {len(ids)} ids, the model has {count} rows")
    if not all(isinstance(raw, str) for raw in ids):
        raise _damaged(path, "holds an id that is no string")
    if len(set(ids)) != len(ids):
        raise _damaged(path, f"holds {len(ids) - len(set(ids))} ids twice")


def _check_items(items: list[Any], count: int, path: Path) -> None:
    for row, item in enumerate(items):
        if not (isinstance(item, dict) and isinstance(item.get("title"), str) and "item_id" in item):
            raise _damaged(path, f"row {row} is no object with item_id and title")
    _check_ids([item["item_id"] for item in items], count, path)
