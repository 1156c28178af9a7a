"""Servers written by hand that do the endpoint's work for one kind of request, as short as one would write them.

    python -m tests.benchmarks.serving_peers numpy BUNDLE PORT

They read the same bundle, check the same request and answer the same fields: known users, the bundle's own strength, seen items
left out. Nothing else the endpoint does is here: no history, fold-in, filters, comparison, metrics, replicas or model swap.

``empty`` is Ray Serve as the endpoint has it, with a route that answers ``{}``: what Serve costs by itself, and no endpoint on
it can be below.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import Body, FastAPI, Response
from safetensors.numpy import load_file

from serving import APPLICATION
from serving.run import prepare_endpoint, stop_endpoint
from serving.schemas import RecommendRequest

Search = Callable[[npt.NDArray[np.float32], int], tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
MOST_SEEN = 20  # of `tests.bundles.write_factor_bundle`


def numpy_search(items: npt.NDArray[np.float32]) -> Search:
    """Exact: all products, the best by partition."""

    def search(user: npt.NDArray[np.float32], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        scores = items @ user
        best = np.argpartition(scores, len(scores) - count)[len(scores) - count :]
        best = best[np.argsort(-scores[best])]
        return best, scores[best]

    return search


def faiss_search(items: npt.NDArray[np.float32], kind: str) -> Search:
    """Exact with ``flat``, approximate with ``hnsw``."""
    import faiss

    faiss.omp_set_num_threads(1)
    if kind == "flat":
        index = faiss.IndexFlatIP(items.shape[1])
    else:
        index = faiss.IndexHNSWFlat(items.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 64
    index.add(items)

    def search(user: npt.NDArray[np.float32], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        scores, rows = index.search(user[None], count)
        return rows[0], scores[0]

    return search


def create_app(bundle: Path, kind: str) -> FastAPI:
    """One route that ranks."""
    model = load_file(bundle / "model.safetensors")
    strength = json.loads((bundle / "bundle.json").read_text())["debias_strength"]
    users = model["factual.users"]
    items = (1 - strength) * model["factual.items"] + strength * model["counterfactual.items"]
    user_rows = {raw: row for row, raw in enumerate(json.loads((bundle / "users.json").read_text()))}
    described = json.loads((bundle / "items.json").read_text())
    ids, titles = [one["item_id"] for one in described], [one["title"] for one in described]
    indptr, seen_items = model["seen_indptr"], model["seen_items"]
    search = numpy_search(items) if kind == "numpy" else faiss_search(items, kind.removeprefix("faiss-"))
    app = FastAPI()

    @app.post("/v1/recommend")
    async def recommend(request: Annotated[RecommendRequest, Body()]) -> Response:
        results: list[Any] = []
        for user_id in request.users:
            user = user_rows[user_id]
            seen = set(seen_items[indptr[user] : indptr[user + 1]].tolist())
            rows, scores = search(users[user], request.k + MOST_SEEN)
            kept = [(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True) if row not in seen]
            ranked = [
                {"rank": rank, "item_id": ids[row], "title": titles[row], "score": score}
                for rank, (row, score) in enumerate(kept[: request.k], start=1)
            ]
            results.append({"user_id": user_id, "cold": False, "method": "personalised", "reason": None, "items": ranked})
        answer = {"model_version": "1", "debias": strength, "results": results}
        return Response(json.dumps(answer), media_type="application/json")

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    return app


def serve_empty(port: int) -> None:
    """Ray Serve as our endpoint has it, with nothing of ours behind it, until it is interrupted."""
    app = FastAPI()

    @app.post("/v1/recommend")
    async def recommend() -> Response:
        return Response(b"{}", media_type="application/json")

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    prepare_endpoint(port=port).result()
    from ray import serve  # once Ray's environment is as the endpoint has it

    @serve.deployment(max_ongoing_requests=512, logging_config={"enable_access_log": False})
    @serve.ingress(app)
    class Empty:
        """Nothing."""

    try:
        serve.run(Empty.bind(), name=APPLICATION, route_prefix="/")  # type: ignore[attr-defined]
        threading.Event().wait()
    except KeyboardInterrupt:
        stop_endpoint()


if __name__ == "__main__":
    if sys.argv[1] == "empty":
        serve_empty(int(sys.argv[3]))
    else:
        uvicorn.run(create_app(Path(sys.argv[2]), sys.argv[1]), host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
