"""Debiased scores from a model bundle: numpy only, the one implementation that training, evaluation and serving share.

A bundle (`serving.bundle` reads it) holds two models of one form (`components.cllmr.linear.scores`): the factual one, and the
counterfactual one, which is the same without the text's propensity. Whatever the formulation (`components.cllmr.effects`), with
F and C their scores:

    factual   TE_ui   = F_ui
    direct    NDE_ui  = F_ui - C_ui
    indirect  TNIE_ui = C_ui
    debiased  y_ui    = TE_ui - λ NDE_ui = (1 - λ) F_ui + λ C_ui

So a debiased score has the form of the others: an inner product and weights from the user's items.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from components.cllmr.linear.compact import CompactItems, ItemStorage
from components.cllmr.linear.scores import LinearScores, by_popularity, mixed, products
from components.errors import ArtifactError, ConfigError, did_you_mean
from components.ids import UNKNOWN, Vocabulary
from serving.bundle import GOLDEN_FILE, REBUILD, models_of, read_bundle
from serving.ranking import Candidates, Floats, Matching, Ranking, Rows, top_k

GOLDEN_TOLERANCE = 1e-5  # float32 sums over some hundred terms differ by the order of summation: about 1e-6 of the largest term

WEIGHT_PRODUCTS, BLOCK_PRODUCTS, SCORE_PRODUCTS = 32, 1 << 20, 64
"""Products that take as long as one weight between items, and, where items come on top of the training data, as a block of
weights and as each of its scores, which are summed and standardised; measured."""

_ROWS_AT_ONCE = 65_536

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
        model: tensors of the bundle, checked by `read_bundle`.
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
        of_factual = by_popularity(self.popularity)
        self.popularity_scores: Mapping[str, Floats] = {
            "factual": of_factual,
            "counterfactual": model.get("counterfactual_popularity", of_factual),
        }
        """Popularity as each model scores it, before its weight, standardised: (num_items,)."""
        members = bundle.get("members", {})
        weights = {"factual": members, "counterfactual": bundle.get("counterfactual_members", members)}
        self._popularity_weights = {name: np.float32(of.get("popularity", 0.0)) for name, of in weights.items()}
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
        """Of a bundle on disk; golden requests are replayed by `replay_golden`, not here.

        Args:
            bundle_dir: the bundle.
            storage: of the item vectors in memory; the rest stays as it is.

        Raises:
            ArtifactError: see `read_bundle`.
        """
        return cls(*read_bundle(bundle_dir, storage))

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
            seen = self.seen(user)
            total = total + self.factual.added(user, new, seen)[rows]
            indirect = indirect + self.counterfactual.added(user, new, seen)[rows]
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
                total += 0 if model.folding is None else self.products_per_user + self.num_items * SCORE_PRODUCTS
        return total

    @property
    def folds_in(self) -> bool:
        """Whether somebody who is not in the training data can be answered from his history."""
        return bool(self._blocks["factual"]) or self.factual.folding is not None

    def fold_in(self, items: npt.ArrayLike, debias: float | None = None) -> Floats:
        """Scores of somebody without a row here, from his history: (num_items,).

        Args:
            items: history, item rows; `UNKNOWN` is ignored. Without any known item all scores are those of popularity, which
                has a weight, and a log that it is counted in, of its own in each model.
            debias: λ in [0, 1]; the bundle's own when None.
        """
        history, strength = _known(items), self._strength(debias)
        models = {"factual": (self.factual, 1 - strength), "counterfactual": (self.counterfactual, strength)}
        total = np.zeros(self.num_items, dtype=np.float32)
        for name, (model, share) in models.items():
            if share:
                popular = self._popularity_weights[name] * self.popularity_scores[name]
                total += np.float32(share) * (popular + model.folded(self._blocks[name], history))
        return total

    def popular(self, debias: float | None = None) -> Floats:
        """Scores of somebody of whom nothing is known: popularity as the two models score it, mixed, (num_items,).

        Args:
            debias: λ in [0, 1]; the bundle's own when None. At 0 every click counts.
        """
        strength = np.float32(self._strength(debias))
        factual, counterfactual = self.popularity_scores["factual"], self.popularity_scores["counterfactual"]
        if strength == 0.0 or counterfactual is factual:
            return factual
        scores: Floats = (1 - strength) * factual + strength * counterfactual
        return scores

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
                        scores[place] += share * model.added(user, new, self.seen(user))
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
            raise ArtifactError(f"bundle {self.fingerprint} has no golden requests ({GOLDEN_FILE}).", REBUILD)
        for number, entry in enumerate(self._golden):
            if problem := self._golden_problem(entry, tolerance):
                raise ArtifactError(f"golden request {number} of bundle {self.fingerprint}: {problem}.", REBUILD)
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


def _known(rows: npt.ArrayLike) -> Rows:
    array = np.asarray(rows, dtype=np.int64)
    return array[array != UNKNOWN]
