"""The page at /ui in a real browser (headless Chromium), asking a real server."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from serving.admission import Admission
from serving.api import create_app
from serving.auth import Tokens
from serving.callers import Callers
from serving.lifecycle import Target, load
from serving.recommender import Recommender
from serving.schemas import Filter, Range, RecommendRequest
from serving.scorer import Scorer
from tests.backends import LocalBackend
from tests.bundles import write_bundle, write_item_columns, write_random_bundle

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOKEN = "a-token-that-is-long-enough"
PATIENCE_MS = 120_000  # with a busy machine

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the page is looked at in Chromium: make system, or apt-get install chromium"
)
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=PATIENCE_MS
        )
        yield browser
        browser.close()


@contextmanager
def served(recommender: Recommender, tokens: Tokens | None = None) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))  # before the thread runs: who comes early waits
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(LocalBackend(recommender), Admission(callers=Callers(tokens or Tokens({})))), log_level="error"
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/ui/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    bundle = write_random_bundle(tmp_path_factory.mktemp("ui") / "bundle", num_users=20, num_items=80)
    return Recommender(Scorer.load(bundle), "7")


@pytest.fixture(scope="module")
def url(recommender: Recommender) -> Iterator[str]:
    with served(recommender) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab without a past; whatever it writes to its console as an error fails the test."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []  # refusals are told on the page


def titles(page: Page, ranking: str) -> list[str]:
    return page.locator(f"#{ranking} .title").all_text_contents()


def ranked(recommender: Recommender, user: int, debias: float | None, k: int = 10) -> list[str]:
    scorer = recommender.scorer
    return [scorer.titles[row] for row in scorer.recommend(user, k, debias, exclude=scorer.seen(user)).rows]


def test_both_rankings_of_a_user_stand_side_by_side(page: Page, url: str, recommender: Recommender) -> None:
    page.goto(url)
    page.fill("#user", "u3")
    page.click("text=Show")
    expect(page.locator("#debiased .title")).to_have_count(10)
    assert titles(page, "factual") == ranked(recommender, 3, 0.0)
    assert titles(page, "debiased") == ranked(recommender, 3, None)
    expect(page.locator("#lambda")).to_have_text(f"{recommender.scorer.debias_strength:.2f}")
    expect(page.locator("#how")).to_have_text("Ranked by the trained model. Model 7.")


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ("fresh", "Ranked by the trained model. Model 7."),
        ("stale", "Ranked by the trained model. The history is older than the feature store allows. Model 7."),
        (
            "last_good",
            "Ranked by the trained model. The feature store does not answer: the history is the last that was known.",
        ),
    ],
)
def test_the_age_of_the_history_is_told_where_it_is_not_fresh(page: Page, url: str, history: str, told: str) -> None:
    def aged(route: Route) -> None:
        answer = route.fetch().json()
        answer["results"][0]["history"] = history
        route.fulfill(json=answer)

    page.route("**/v1/recommend", aged)
    page.goto(f"{url}#user=u3&k=10&debias=0")
    expect(page.locator("#how")).to_contain_text(told)


def test_the_slider_debiases_and_says_how_far_items_moved(page: Page, url: str, recommender: Recommender) -> None:
    page.goto(f"{url}#user=u3&k=40&debias=0")
    expect(page.locator("#debiased .title")).to_have_count(40)
    assert titles(page, "debiased") == ranked(recommender, 3, 0.0, 40)
    assert "".join(page.locator("#debiased .move").all_text_contents()) == ""
    page.locator("#debias").fill("1")
    expect(page.locator("#lambda-of-ranking")).to_have_text("1.00")
    after, before = ranked(recommender, 3, 1.0, 40), ranked(recommender, 3, 0.0, 80)
    assert titles(page, "debiased") == after
    told = dict(zip(after, page.locator("#debiased .move").all_text_contents(), strict=True))
    for place, title in enumerate(after):
        gained = before.index(title) - place
        assert told[title] == (f"▲ {gained}" if gained > 0 else f"▼ {-gained}" if gained < 0 else "")
    assert any(told.values())
    page.click("text=As trained")
    expect(page.locator("#lambda")).to_have_text(f"{recommender.scorer.debias_strength:.2f}")
    assert "user=u3" in page.evaluate("location.hash")


def test_a_chosen_item_is_taken_apart(page: Page, url: str) -> None:
    page.goto(f"{url}#user=u3&debias=1")
    expect(page.locator("#debiased .title")).to_have_count(10)
    page.fill("#user", "u5")  # not asked for yet: what is explained is what is shown
    with page.expect_response("**/v1/explain") as answered:
        page.locator("#debiased .item").first.click()
    assert answered.value.json()["user_id"] == "u3"
    explanation = answered.value.json()["explanation"]
    expect(page.locator("#why dd").first).to_have_text(f"{explanation['total_effect']:.3f}")
    expect(page.locator("#why")).to_contain_text(f"{explanation['factual_rank']} → {explanation['debiased_rank']}")
    expect(page.locator("#debiased .item").first).to_have_attribute("aria-pressed", "true")


def test_pasted_items_count_for_an_explanation_as_for_the_ranking(page: Page, url: str) -> None:
    page.goto(url)
    page.fill("#user", "u3")
    page.fill("#liked", "i3, i4")
    page.click("text=Show")
    expect(page.locator("#debiased .title")).to_have_count(10)
    page.fill("#liked", "i5")  # not asked for yet
    with page.expect_response("**/v1/explain") as answered:
        page.locator("#debiased .item").first.click()
    score = answered.value.json()["explanation"]["debiased_score"]
    assert float(page.locator("#debiased .score").first.inner_text()) == pytest.approx(score, rel=5e-3)


@pytest.mark.parametrize("late", [{"status": 200}, {"status": 503, "json": {"message": "Too late."}}])
def test_an_explanation_that_another_ranking_overtook_is_dropped_and_so_is_its_error(
    page: Page, url: str, late: dict[str, Any]
) -> None:
    waiting: dict[str, Route] = {}

    def hold(route: Route) -> None:
        asked = route.request.post_data_json
        waiting[asked.get("user_id", "ranking")] = route

    def held(name: str) -> Route:
        while name not in waiting:
            page.wait_for_timeout(10)
        return waiting[name]

    def explain(user: str, **answer: Any) -> None:
        with page.expect_response("**/v1/explain") as answered:
            held(user).fulfill(**answer)
        answered.value.finished()
        page.evaluate("new Promise((done) => setTimeout(done))")  # what waited for it has gone on

    page.goto(f"{url}#user=u3")
    expect(page.locator("#debiased .title")).to_have_count(10)
    page.route("**/v1/recommend", hold)
    page.route("**/v1/explain", hold)
    page.fill("#user", "u5")
    page.click("text=Show")
    ranking = held("ranking")
    page.locator("#debiased .item").first.click()  # still of u3
    told = held("u3").fetch().json()
    ranking.continue_()
    explain("u5", json={**told, "title": "Of u5"})
    expect(page.locator("#why")).to_contain_text("Of u5")
    explain("u3", **{"json": {**told, "title": "Of u3"}, **late})
    expect(page.locator("#why")).to_contain_text("Of u5")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_somebody_new_is_ranked_from_pasted_items_and_from_nothing(page: Page, url: str, recommender: Recommender) -> None:
    page.goto(url)
    page.fill("#liked", "i3, an id; with blanks ,i3,")
    with page.expect_request("**/v1/recommend") as asked:
        page.click("text=Show")
    assert asked.value.post_data_json["recent"] == {"somebody new": ["i3", "an id; with blanks"]}
    expect(page.locator("#how")).to_contain_text("ranked from the liked items")
    page.locator("#debiased .item").first.click()
    expect(page.locator("#why")).to_contain_text("for users with training interactions only")
    page.fill("#liked", "")
    page.fill("#user", "nobody")
    page.click("text=Show")
    expect(page.locator("#how")).to_contain_text("the most popular items")
    most = float(recommender.scorer.popular().max())
    expect(page.locator("#debiased .score").first).to_have_text(f"{most:.2f}")


def test_what_the_server_refuses_is_told_in_its_words(page: Page, url: str) -> None:
    page.goto(url)
    page.click("text=Show")
    expect(page.get_by_role("alert")).to_contain_text("Type a user")
    page.fill("#user", "u3")
    page.evaluate("document.getElementById('ask').noValidate = true")
    page.fill("#k", "1000")
    page.click("text=Show")
    expect(page.get_by_role("alert")).to_contain_text("less than or equal to 200")
    expect(page.get_by_role("alert")).to_contain_text("See /docs")


def test_titles_are_text_whatever_they_hold(page: Page, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=document.title='owned'>"
    bundle = write_bundle(tmp_path / "bundle")
    recommender = Recommender(Scorer.load(bundle), "7")
    recommender.scorer.titles[:] = [hostile] * len(recommender.scorer.titles)
    with served(recommender) as url:
        page.goto(f"{url}#user=ann")
        expect(page.locator("#debiased .title").first).to_have_text(hostile)
        assert page.locator("#debiased img").count() == 0
        assert page.title() != "owned"


def test_a_closed_endpoint_is_asked_with_the_token_that_is_typed(page: Page, recommender: Recommender) -> None:
    with served(recommender, Tokens({TOKEN: frozenset({"score"})})) as url:
        page.goto(f"{url}#user=u3")
        expect(page.get_by_role("alert")).to_contain_text("a token that is known here")
        page.click("summary >> text=Access token")
        page.fill("#token", TOKEN)
        page.click("text=Show")
        expect(page.locator("#debiased .title")).to_have_count(10)
        assert TOKEN not in page.url


# -- filters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """Items with groups, numbers, more values than are listed, and texts of their own."""
    bundle = write_random_bundle(tmp_path_factory.mktemp("shop") / "bundle", num_users=20, num_items=600)
    columns = {
        "genres": [["Comedy, Drama", "Drama", "War"][row % 3] for row in range(600)],
        "release_year": [str(1900 + row % 100) for row in range(600)],
        "maker": [f"Maker {row // 2}" for row in range(600)],
        "story": [f"Of {row}." for row in range(600)],
    }
    write_item_columns(bundle, named=tuple(columns), **columns)
    return load(Target("7", "f" * 16, "", str(bundle))).recommender


@pytest.fixture(scope="module")
def shop_url(shop: Recommender) -> Iterator[str]:
    with served(shop) as url:
        yield url


def passing(shop: Recommender, filters: dict[str, Filter], k: int = 10) -> list[str]:
    (result,) = shop.recommend(RecommendRequest(users=["u3"], k=k, filters=filters), [[]]).results
    return [item.title for item in result.items]


def test_fields_are_offered_for_what_items_can_be_chosen_by(page: Page, shop_url: str) -> None:
    page.goto(shop_url)
    expect(page.locator("#columns legend")).to_have_text(["genres", "release year", "maker"])  # stories are no groups
    expect(page.get_by_label("genres").locator("option")).to_have_text(["any", "Drama", "Comedy", "War"])
    expect(page.get_by_label("release year, from")).to_have_attribute("placeholder", "1900")
    expect(page.get_by_label("release year, to")).to_have_attribute("placeholder", "1999")
    expect(page.locator("#columns input[list]")).to_have_count(1)  # the makers: more than are listed
    expect(page.locator("#unfilter")).to_be_hidden()


def test_items_are_filtered_by_what_is_chosen_and_no_more_once_it_is_taken_back(
    page: Page, shop_url: str, shop: Recommender
) -> None:
    page.goto(f"{shop_url}#user=u3")
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, {}))
    page.get_by_label("genres").select_option("War")
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, {"genres": ["War"]}))
    page.get_by_label("genres").select_option("Comedy")
    page.get_by_label("release year, from").fill("1950")
    page.get_by_label("release year, to").fill("1969.5")
    page.keyboard.press("Enter")
    both: dict[str, Filter] = {"genres": ["War", "Comedy"], "release_year": Range(min=1950, max=1969.5)}
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, both))
    page.click(".chip >> text=War")
    page.get_by_label("release year, to").fill("")
    page.keyboard.press("Tab")
    less: dict[str, Filter] = {"genres": ["Comedy"], "release_year": Range(min=1950)}
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, less))
    expect(page.locator(".chip")).to_have_text(["Comedy"])
    page.click("text=No filters")
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, {}))
    expect(page.locator(".chip")).to_have_count(0)
    expect(page.get_by_label("release year, from")).to_have_value("")


def test_the_address_holds_the_filters_too(page: Page, shop_url: str, shop: Recommender) -> None:
    wanted: dict[str, Filter] = {"genres": ["Drama", "War"], "release_year": Range(max=1950), "maker": ["Maker 7"]}
    page.goto(shop_url)
    page.fill("#user", "u3")
    for value in ("Drama", "War"):
        page.get_by_label("genres").select_option(value)
    page.get_by_label("release year, to").fill("1950")
    page.locator("#columns input[list]").fill("Maker 7")
    page.click("text=Show")
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, wanted))
    address = page.evaluate("location.hash")
    page.goto("about:blank")
    page.goto(f"{shop_url}{address}")
    expect(page.locator("#debiased .title")).to_have_text(passing(shop, wanted))
    expect(page.locator(".chip")).to_have_text(["Drama", "War", "Maker 7"])
    expect(page.get_by_label("release year, to")).to_have_value("1950")
    page.click("summary >> text=Filters")
    expect(page.locator("#filtered")).to_have_text("genres Drama or War; release year to 1950; maker Maker 7")


def test_what_no_item_passes_and_what_the_model_does_not_know_is_told(page: Page, shop_url: str) -> None:
    page.goto(f"{shop_url}#user=u3&filter=release_year=1900..1900&filter=maker=Maker 1")
    for ranking in ("factual", "debiased"):
        expect(page.locator(f"#{ranking}")).to_have_text(
            "No item is left: none passes the filters, or the user knows them all."
        )
    page.goto("about:blank")
    page.goto(f"{shop_url}#user=u3&filter=genre=War")
    expect(page.get_by_role("alert")).to_contain_text("cannot be filtered by 'genre'. Did you mean 'genres'?")
    page.click("text=No filters")
    page.click("text=Show")
    expect(page.locator("#debiased .title")).to_have_count(10)


def test_without_columns_there_is_nothing_of_filters(page: Page, url: str) -> None:
    with page.expect_response("**/v1/model"):
        page.goto(f"{url}#user=u3")
    expect(page.locator("#debiased .title")).to_have_count(10)
    expect(page.locator("#filters")).to_be_hidden()


def test_a_closed_endpoint_tells_its_columns_to_who_may_know_what_is_served(page: Page, shop: Recommender) -> None:
    reader, admin = f"reader-{TOKEN}", f"admin-{TOKEN}"
    with served(shop, Tokens({reader: frozenset({"score"}), admin: frozenset({"score", "admin"})})) as url:
        page.goto(f"{url}#user=u3&filter=genres=War")
        expect(page.locator("#filtered")).to_have_text("genres War")  # what will be asked is said in any case
        page.click("summary >> text=Access token")
        page.fill("#token", reader)
        page.click("text=Show")
        expect(page.locator("#debiased .title")).to_have_text(passing(shop, {"genres": ["War"]}))
        page.click("summary >> text=Filters")
        expect(page.locator("#columns")).to_contain_text("this needs the scope 'admin'")
        page.fill("#token", admin)
        page.keyboard.press("Tab")
        expect(page.locator(".chip")).to_have_text(["War"])
