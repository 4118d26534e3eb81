"""HoVer claims (Jiang et al. 2020): is a claim that rests on several Wikipedia articles SUPPORTED or NOT_SUPPORTED?

`hover:SOURCE` has the hard claims, of three and four hops; `hover-ood:SOURCE` those of two. SOURCE is the Hub's
hover-nlp/hover, a folder with the published hover_train_release_v1.1.json and hover_dev_release_v1.1.json, or one such
file, of which a tenth is held out. The published data names the articles; their texts are in its wiki_wo_links.db.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError, quoted
from fst_fast.records import Problem, Verdict
from fst_fast.tasks.datasets import records
from fst_fast.tasks.published import LONGEST, PublishedOptions, PublishedTask, field
from fst_fast.tasks.split import mixed
from fst_fast.tasks.verifiers import final_answer

PROMPT = (
    "Decide whether the claim is true. Check every fact in it against its article, one after the other. "
    "End with 'answer: SUPPORTED' or 'answer: NOT_SUPPORTED'."
)
LABELS = ("NOT_SUPPORTED", "SUPPORTED")  # in the order of the Hub's class labels
LONGEST_ARTICLE = 3000  # characters of an article that are shown
LONGEST_ANSWER = 300  # characters of a final answer that are read
FILLERS = set(
    re.findall(
        "[a-z]+",
        "a above answer article articles boxed by claim conclude conclusion evidence final given hence i is it label "
        "mathrm my of provided so statement text textbf that the therefore this thus verdict",
    )
)
STATEMENTS = {
    "supported": "SUPPORTED", "supports": "SUPPORTED",
    "not supported": "NOT_SUPPORTED", "unsupported": "NOT_SUPPORTED", "does not support": "NOT_SUPPORTED",
}  # fmt: skip


class HoverTask(PublishedTask):
    def __init__(self, source: str, options: PublishedOptions, *, unseen: bool = False):
        super().__init__(f"hover{'-ood' if unseen else ''}:{source}", PROMPT, options)
        hops = {2, 3, 4} - set(options.hops) if unseen else set(options.hops)
        articles = Articles(options.wiki) if options.wiki else None

        def read(source: str, split: str) -> list[Problem]:
            rows = [_row(row, f"{source}, row {i}") for i, row in enumerate(records(source, split), start=1)]
            found = [self._problem(row, articles) for row in rows if row["num_hops"] in hops]
            if not found:
                raise UserError(f"{source}: no claim has {' or '.join(map(str, sorted(hops)))} hops (data.hops).")
            if len({p.id for p in found}) < len(found):
                raise UserError(f"{source}: two claims have the same uid.")
            return found

        folder = Path(source)
        if folder.is_file():
            self.hold_out(read(source, "train"), source)
            return
        if folder.is_dir():
            self.validation = mixed(read(_release(folder, "dev"), "validation"))
            train = read(_release(folder, "train"), "train")
        else:
            self.validation, train = mixed(read(source, "validation")), read(source, "train")
        held_out = {p.data["claim"] for p in self.validation}
        self.train = [p for p in train if p.data["claim"] not in held_out]

    def _problem(self, row: Mapping[str, Any], articles: Articles | None) -> Problem:
        texts = [f"{title}: {articles[title]}" for title in row["titles"]] if articles else []
        evidence = "".join(f"{text}\n\n" for text in texts or row["context"])
        problem = f"{evidence}Claim: {row['claim']}\nIs the claim SUPPORTED or NOT_SUPPORTED?"
        data = {"problem": problem, "claim": row["claim"], "label": row["label"], "titles": row["titles"]}
        return Problem(f"{self.name}/{row['uid']}", data)

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Reward 1 for the right label; `hops` is the part of the claim's articles that the response mentions."""
        expected, titles = problem.data["label"], problem.data["titles"]
        label = read_label(response)
        said_text = _folded(response[-LONGEST:])
        missed = [title for title in titles if _folded(_name(title)) not in said_text]
        parts = {
            "label": float(label == expected),
            "read": float(label is not None),
            "hops": 1 - len(missed) / max(1, len(titles)),
        }
        if label == expected:
            return Verdict(1.0, "correct.", parts)
        if label is None:
            said = "the final answer must be SUPPORTED or NOT_SUPPORTED, alone after 'answer:'."
        else:
            said = f"the claim is {expected}, not {label}."
        hops = f"it rests on {len(titles)} articles: {'; '.join(titles)}."
        if missed:
            hops += f" the response misses the hop to {'; '.join(missed)}."
        else:
            hops += " the response mentions them all, and combines them wrongly."
        return Verdict(0.0, f"{said} {hops} expected: {expected}", parts)


def read_label(response: str) -> str | None:
    """The label that the final answer states, and nothing beside it; None when it does not."""
    answer = unicodedata.normalize("NFKC", final_answer(response[-LONGEST:])).casefold().replace("’", "'")
    if len(answer) > LONGEST_ANSWER or "?" in answer:
        return None
    answer = re.split(r"\b(?:because|since)\b", answer)[0]
    words = [w for w in re.findall(r"[^\W_]+", answer.replace("n't", " not")) if w not in FILLERS]
    return STATEMENTS.get(" ".join(words))


class Articles:
    """Title → text, from HoVer's wiki_wo_links.db: a table `documents` of `id` (the title, in NFD) and `text`."""

    def __init__(self, path: str):
        self._path = path
        if not Path(path).is_file():
            raise UserError(f"data.wiki: {path!r} is not a file; give HoVer's wiki_wo_links.db, or leave it out.")
        self._db = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)

    def __getitem__(self, title: str) -> str:
        try:
            found = self._db.execute(
                "SELECT text FROM documents WHERE id = ?", (unicodedata.normalize("NFD", title),)
            ).fetchone()
        except sqlite3.Error as e:
            raise UserError(f"data.wiki: {self._path} is not HoVer's wiki_wo_links.db ({e}).") from None
        if not found:
            raise UserError(f"data.wiki: {self._path} has no article {quoted(title)}.")
        return str(found[0])[:LONGEST_ARTICLE].strip()


def _release(folder: Path, split: str) -> str:
    """The folder's published file of a split."""
    name = f"hover_{split}_release_v1.1.json"
    if not (folder / name).is_file():
        raise UserError(f"hover:{folder}: there is no {name} in the folder; download HoVer's release into it.")
    return str(folder / name)


def _row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row in one form: the release's [title, sentence] pairs and label names, or the Hub's objects and numbers."""
    label = row.get("label")
    if isinstance(label, int) and label in (0, 1):
        label = LABELS[label]
    if label not in LABELS:
        raise UserError(f"{where}: field 'label' is {quoted(label)}; it must be SUPPORTED or NOT_SUPPORTED.")
    titles = []
    for fact in field(row, "supporting_facts", list, where):
        title = fact.get("key") if isinstance(fact, dict) else fact[0] if isinstance(fact, list | tuple) and fact else 0
        if not isinstance(title, str):
            raise UserError(f"{where}: field 'supporting_facts' holds {quoted(fact)}, not [title, sentence].")
        titles.append(title)
    return {
        "uid": field(row, "uid", str, where),
        "claim": field(row, "claim", str, where).strip(),
        "num_hops": field(row, "num_hops", int, where),
        "label": label,
        "titles": tuple(dict.fromkeys(titles)),
        "context": _context(row.get("context") or ()),
    }


def _context(context: str | Iterable[Any]) -> list[str]:
    """The texts of a row's own evidence: one text, or [title, text] pairs."""
    if isinstance(context, str):
        return [context]
    return [part if isinstance(part, str) else ": ".join(map(str, part)) for part in context]


def _name(title: str) -> str:
    """A title without what tells it from others of its name: "The Shining (film)" is said as "The Shining"."""
    return re.sub(r" \([^()]*\)$", "", title)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
