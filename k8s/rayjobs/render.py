"""Renders every overlay's Ray job templates into the files its ConfigMap `cllmr-rayjobs` is made of.

usage: python k8s/rayjobs/render.py [--check]    --check writes nothing and fails when a file is not what it would be
"""

import subprocess
import sys
from pathlib import Path

import yaml

K8S = Path(__file__).parents[1]
HEADER = "# Rendered by k8s/rayjobs/render.py from k8s/rayjobs; change it there.\n"


def rendered(directory: Path) -> dict[Path, str]:
    """The RayJobs that a kustomization makes, each as the file beside it that it belongs into."""
    command = ["kubectl", "kustomize", str(directory)]
    documents = yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    jobs = [document for document in documents if document["kind"] == "RayJob"]
    return {directory / f"{job['metadata']['name']}.yaml": HEADER + yaml.safe_dump(job) for job in jobs}


def main() -> int:
    """Writes the files, or names those that are stale; the exit code."""
    stale = 0
    for kustomization in sorted(K8S.glob("overlays/*/rayjobs/kustomization.yaml")):
        for file, text in rendered(kustomization.parent).items():
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
            elif not file.exists() or file.read_text(encoding="utf-8") != text:
                sys.stderr.write(f"{file.relative_to(K8S)} is stale; run: make manifests\n")
                stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
