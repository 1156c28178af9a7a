"""How much the words of texts count for items that are new: chosen by items as if they were new, written, read and answered."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

from components.cllmr.linear.kernel import NewItems
from components.errors import ArtifactError
from components.train.new_items import with_words
from serving.recommender import Recommender
from serving.schemas import ItemsRequest, NewItem
from serving.scorer import Scorer
from serving.texts import Texts
from tests.bundles import write_random_bundle, write_text

NUM_USERS, NUM_ITEMS, NUM_BRANDS = 60, 120, 12
BRANDS = np.arange(NUM_ITEMS) % NUM_BRANDS


def embeddings() -> npt.NDArray[np.float32]:
    """Which say nothing of whose an item is."""
    drawn = np.random.default_rng(0).standard_normal((NUM_ITEMS, 8)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def clicks(of_brands: bool) -> tuple[sp.csr_array, sp.csr_array]:
    """Training and validation: users choose items of two brands, or any."""
    rng, likely = np.random.default_rng(1), np.ones((NUM_USERS, NUM_ITEMS))
    if of_brands:
        liked = np.array([rng.choice(NUM_BRANDS, 2, replace=False) for _ in range(NUM_USERS)])
        likely = 0.02 + (BRANDS[None, :, None] == liked[:, None]).any(axis=2)
    drawn = rng.random((NUM_USERS, NUM_ITEMS))
    chosen = np.argsort(-likely * drawn, axis=1)[:, :14]
    splits = []
    for part in (chosen[:, ::2], chosen[:, 1::2]):
        dense = np.zeros((NUM_USERS, NUM_ITEMS), np.float32)
        np.put_along_axis(dense, part, 1.0, axis=1)
        splits.append(sp.csr_array(dense))
    return splits[0], splits[1]


def test_words_count_where_they_tell_what_users_choose_and_nowhere_else() -> None:
    known, texts = NewItems.of(embeddings(), 2.0), [f"Brand{brand} thing" for brand in BRANDS]
    found = with_words(known, texts, *clicks(of_brands=True), seed=0)
    assert found.words is not None
    assert found.words.share in (0.3, 0.5)
    assert found.side is known.side
    assert with_words(known, ["the same thing"] * NUM_ITEMS, *clicks(of_brands=True), seed=0) is known
    assert with_words(known, [""] * NUM_ITEMS, *clicks(of_brands=False), seed=0) is known
    nobody = sp.csr_array((NUM_USERS, NUM_ITEMS), dtype=np.float32)
    assert with_words(known, texts, clicks(of_brands=True)[0], nobody, seed=0) is known


def test_a_new_item_is_scored_by_the_words_it_begins_with_too_and_older_bundles_as_they_were(tmp_path: Path) -> None:
    directory = write_random_bundle(tmp_path / "bundle", num_items=NUM_ITEMS)
    drawn, told = embeddings(), [f"Brand{brand} thing. Colour: red." for brand in BRANDS]
    new = [NewItem(item_id=f"of {brand}", text=f"brand{brand} thing. Colour: blue.") for brand in (3, 5)]
    request, same = ItemsRequest(items=new, users=["who"]), drawn[[3, 3]]  # whose embeddings tell nothing apart

    def scores() -> list[float | None]:
        scorer = Scorer.load(directory)
        texts = Texts(directory, scorer)
        recommender, history = Recommender(scorer, "1", texts), ["i3", "i15", "i27"]  # all of brand 3
        answer = recommender.new_items(request, [history], "MiniLM", texts.read(), same)
        return [result.scores[0].score for result in answer.results]

    write_text(directory, drawn, "MiniLM")
    without = scores()
    assert without[0] == without[1]
    known = write_text(directory, drawn, "MiniLM", told=told, share=0.4)
    placed = known.placed(known.rows(same, [item.text for item in new]), np.array([3, 15, 27]))
    assert placed is not None
    found = scores()
    np.testing.assert_allclose(np.array(found, float), placed.scores, atol=5e-3)  # words and texts have half precision there
    assert placed.scores[0] > placed.scores[1] + 0.5
    tensors = load_file(directory / "text.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "words.rarity"}, directory / "text.safetensors")
    with pytest.raises(ArtifactError, match=r"text\.safetensors cannot be read: 'words\.rarity'"):
        scores()
