"""Which belong together? Descriptions of functions and the code that calls them, matched by two towers.

    python -m deepsim_ext.examples.text_matching

Two kinds of documents that say the same in other words, as jobs and resumes do: of every docstring in NumPy,
SciPy, scikit-learn and NetworkX with an example, the prose above its parameters is one document, the example
the other; the function's own name is taken out of both. Each tower takes the TF-IDF weights of its kind to an
embedding, by the contrastive loss of given pairs: y = 1 for an example and its own description, 0 for others.

A quarter of the modules is held out, whole files: no document in them was seen, nor a neighbour of one. Of
these documents a match is to be told from a random pair, and every example has to find its description among
several hundred. What there is to beat is the cosine of the TF-IDF weights themselves, without any learning.
The towers know a match better from a random pair; the very nearest description is right about as often.

Needs the extra `deepsim-ext[eval]`; NetworkX comes with torch.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._threads import one_thread
from ..functional import contrastive_loss, nearest_neighbors
from . import _runs

PACKAGES = ("numpy", "scipy", "sklearn", "networkx")
HEADING = re.compile(r"^(\w[\w ]*)\n[-=]{3,}\s*$", re.MULTILINE)
FEWEST_WORDS = 8
HELD_OUT = 0.25  # of the modules
WORDS = 4000  # of the vocabulary
EMBEDDING_SIZE = 256
# Embeddings have length 1: 1.4 is the distance of two that have nothing in common.
MARGIN = 1.4
DOCUMENTS_PER_BATCH, OTHERS = 64, 40
STEPS = 300


class Document(NamedTuple):
    module: str  # package and file
    description: str
    example: str


class Scores(NamedTuple):
    auc: float  # area under the ROC curve of "do these two belong together?"
    recall_at_1: float  # how often the nearest description is the right one
    recall_at_10: float


def read_documents(packages: Sequence[str] = PACKAGES) -> list[Document]:
    """All docstrings with a description and an example; what another one has word for word, once.

    Read from the source files: nothing is imported.

    Raises:
        ImportError: a package is not installed.
    """
    documents, seen = [], set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f'{package} not installed; pip install "deepsim-ext[eval]"')
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            for document in _documents(path, path.relative_to(root.parent).as_posix()):
                if seen.isdisjoint(document[1:]):
                    seen.update(document[1:])
                    documents.append(document)
    return documents


def _documents(path: Path, module: str) -> Iterator[Document]:
    source = path.read_text(encoding="utf-8")
    if ">>>" not in source or "/tests/" in module:
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        description, *sections = HEADING.split(ast.get_docstring(node) or "")
        by_heading = dict(zip(sections[::2], sections[1::2], strict=True))
        example = by_heading.get("Examples", by_heading.get("Example", ""))
        if ">>>" in example and len(description.split()) >= FEWEST_WORDS:
            name = re.compile(rf"\b{re.escape(node.name)}\b")
            yield Document(module, name.sub("", description), name.sub("", example))


class Tower(nn.Module):
    """TF-IDF weights [N, W] to embeddings [N, EMBEDDING_SIZE] on the unit sphere.

    Args:
        projection: [EMBEDDING_SIZE, W] to start from. With the same one in both towers they start near the
            cosine of the weights, by Johnson and Lindenstrauss' lemma (1984), and words that are never seen
            in training stay there; from two different ones a match is no nearer than anything else.
    """

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        self.projection = nn.Parameter(projection.clone())

    def forward(self, weights: Tensor) -> Tensor:
        return F.normalize(weights @ self.projection.T)


def train(towers: Sequence[Tower], kinds: Sequence[Tensor], seed: int, steps: int = STEPS) -> None:
    """Teaches two towers the TF-IDF weights [N, W] of two kinds, of which rows i belong together.

    Every document of a batch is given its own partner, and those of some other documents of the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [*towers[0].parameters(), *towers[1].parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(len(kinds[0]), generator=generator)[:DOCUMENTS_PER_BATCH]
        first, second = (tower(kind[rows]) for tower, kind in zip(towers, kinds, strict=True))
        partners = torch.cat([second.roll(i, 0) for i in range(OTHERS + 1)])
        match = torch.arange(len(partners)) < len(rows)
        loss = contrastive_loss(first.repeat(OTHERS + 1, 1), partners, match, margin=MARGIN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def score(descriptions: Tensor, examples: Tensor) -> Scores:
    """Of embeddings or weights [N, D], row i of one belonging to row i of the other."""
    from sklearn.metrics import roc_auc_score

    n = len(examples)
    own = torch.arange(n)
    nearest = nearest_neighbors(examples, descriptions, min(10, n), distance="cosine").indices
    found = nearest == own[:, None]
    # Each with its own, and with ten others.
    shifts = torch.randint(1, n, (10, n), generator=torch.Generator().manual_seed(0))
    other = ((own + shifts) % n).flatten()
    i, j = torch.cat([own, own.repeat(10)]), torch.cat([own, other])
    auc = roc_auc_score(i == j, F.cosine_similarity(examples[i], descriptions[j]))
    return Scores(float(auc), *(found[:, :k].any(1).double().mean().item() for k in (1, 10)))


def tf_idf(known: Sequence[Document], documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """TF-IDF weights, float32 [N, W], of descriptions and of examples; vocabulary and IDF of known documents.

    A word is a run of letters, so that names in the code fall into their words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        max_features=WORDS, sublinear_tf=True, stop_words="english", token_pattern=r"[A-Za-z]{2,}"
    )
    vectorizer.fit([text for document in known for text in document[1:]])
    texts = [d.description for d in documents], [d.example for d in documents]
    return tuple(torch.from_numpy(vectorizer.transform(kind).toarray()).float() for kind in texts)


def run(seed: int, steps: int = STEPS) -> dict[str, Scores]:
    """The scores on held-out modules of towers that learnt the others, and of what they have to beat.

    Raises:
        ImportError: a package is not installed.
    """
    documents = _all_documents()
    modules = sorted({document.module for document in documents})
    order = torch.randperm(len(modules), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {modules[i] for i in order[: round(HELD_OUT * len(modules))]}
    known = [document for document in documents if document.module not in held_out]
    unknown = [document for document in documents if document.module in held_out]
    kinds, held_out_kinds = tf_idf(known, known), tf_idf(known, unknown)
    projection = torch.randn(EMBEDDING_SIZE, kinds[0].shape[1], generator=torch.Generator().manual_seed(seed))
    towers = [Tower(projection / EMBEDDING_SIZE**0.5) for _ in kinds]

    def of_towers() -> Scores:
        return score(*(tower(kind) for tower, kind in zip(towers, held_out_kinds, strict=True)))

    with one_thread():
        scores = {"cosine of TF-IDF": score(*held_out_kinds), "untrained towers": of_towers()}
        train(towers, kinds, seed, steps)
        return scores | {"trained towers": of_towers()}


@cache
def _all_documents() -> list[Document]:
    """Read once for all seeds."""
    return read_documents()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the scores over some seeds; exit code 0, or 1 for a missing package."""
    return _runs.main("text_matching", "Descriptions and the examples that belong to them.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
