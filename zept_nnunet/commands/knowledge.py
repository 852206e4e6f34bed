"""`zept knowledge`: the descriptions of structures and tumors, and their vectors."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from zept_nnunet.errors import ZePTError
from zept_nnunet.files import nearest_existing, new_files


def register(subparsers: Any) -> None:
    """Add the subcommand and its own."""
    parser = subparsers.add_parser(
        "knowledge",
        help="list, show, check and encode the descriptions of structures and tumors",
        description="What the package knows of structures and tumors: the descriptions from which queries are made.",
    )
    commands = parser.add_subparsers(dest="knowledge_command", required=True, metavar="COMMAND")

    sub = commands.add_parser("list", help="names of all described structures and tumors")
    sub.add_argument("--kind", choices=("organ", "tumor"), help="only these")
    sub.add_argument("--host", help="only tumors of this organ")
    sub.set_defaults(func=run_list)

    sub = commands.add_parser("show", help="one description, with its synonyms and sources")
    sub.add_argument("name", nargs="+", help="a name or synonym, as datasets write it")
    sub.add_argument("--host", action="append", default=[], help='of a "tumor" or "cyst": the organ')
    sub.set_defaults(func=run_show)

    sub = commands.add_parser(
        "check",
        help="check the descriptions, or what a dataset's classes are described by",
        description="Without an option: schema, synonyms and vectors of the built-in descriptions. Exit status 1 when "
        "something is wrong.",
    )
    sub.add_argument("files", nargs="*", type=Path, help="YAML files to check beside the built-in ones")
    sub.add_argument("-d", metavar="ID", help="dataset ID or name: what describes each of its classes")
    sub.set_defaults(func=run_check)

    sub = commands.add_parser(
        "encode",
        help="write a file of vectors, by any text encoder",
        description="Encode all built-in descriptions, those of a dataset's classes and any text given, and write them "
        'into a file that dataset.json names: "zept": {"vectors": "/absolute/path/FILE"}.',
    )
    sub.add_argument("--encoder", metavar="NAME", help="Hugging Face name or local folder (default: the built-in one)")
    sub.add_argument("-d", metavar="ID", help="dataset ID or name, whose own descriptions are encoded too")
    sub.add_argument("--text", action="append", default=[], help="one more description; may be given several times")
    sub.add_argument("-o", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    sub.set_defaults(func=run_encode)

    sub = commands.add_parser(
        "retrieve",
        help="does each query of a trained model find its own description?",
        description="Compare what each query took from the images (without what it was generated from) with "
        "descriptions: rank of its own among the model's classes and among all built-in ones, for seen and unseen "
        "classes, beside controls: chance, embeddings of other classes, blank images. Writes retrieval.csv, "
        "summary.csv and embeddings.png.",
    )
    sub.add_argument("-m", metavar="MODEL_FOLDER", type=Path, required=True, help="TRAINER__PLANS__CONFIGURATION")
    sub.add_argument("-i", metavar="IMAGES", type=Path, required=True, help="folder with CASE_0000 files")
    sub.add_argument("-o", metavar="FOLDER", type=Path, required=True, help="output folder")
    sub.add_argument("-f", nargs="+", default=["0"], metavar="FOLD", help="folds (default: 0)")
    sub.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="name of the checkpoints")
    sub.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"))
    sub.set_defaults(func=run_retrieve)


def run_list(args: argparse.Namespace) -> int:
    """Print one line an entry."""
    from zept_nnunet.knowledge.catalog import catalog

    entries = catalog()
    host = None if args.host is None else entries.find(args.host, kind="organ")
    if args.host is not None and host is None:
        raise ZePTError(f"--host {args.host!r}: no described organ of that name; zept knowledge list --kind organ")
    for entry in sorted(entries, key=lambda e: (e.kind, e.name)):
        if args.kind not in (None, entry.kind):
            continue
        if host is not None and host not in [entries.find(h) for h in entry.hosts]:
            continue
        print(f"{entry.kind}  {entry.name}" + (f"  [{', '.join(entry.hosts)}]" if entry.hosts else ""))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print an entry."""
    from zept_nnunet.knowledge.catalog import SECTIONS, catalog

    entry = catalog().require(" ".join(args.name), args.host)
    print(f"{entry.name} ({entry.kind}; {entry.file})")
    if entry.hosts:
        print(f"hosts: {', '.join(entry.hosts)}")
    if entry.synonyms:
        print(f"synonyms: {', '.join(entry.synonyms)}")
    for section in SECTIONS:
        if section in entry.sections:
            print(textwrap.fill(entry.sections[section], 110, initial_indent=f"{section}: ", subsequent_indent="  "))
    for source in entry.sources:
        print(textwrap.fill(source, 110, initial_indent="source: ", subsequent_indent="  "))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print what is wrong, or what describes each class."""
    from zept_nnunet.knowledge.catalog import catalog, descriptions_folder, read_catalog
    from zept_nnunet.knowledge.source import built_in
    from zept_nnunet.knowledge.texts import built_in_texts
    from zept_nnunet.knowledge.vectors import text_key

    if args.d is not None:
        return _check_dataset(args.d)
    if args.files:
        built_in_files = sorted(descriptions_folder().glob("*.yaml"))
        found = read_catalog(dict.fromkeys(path.resolve() for path in (*built_in_files, *args.files)))
        print(f"{len(found)} descriptions with those of {', '.join(map(str, args.files))}: schema and names in order")
        return 0
    entries = catalog()
    file = built_in().file
    assert file is not None
    stale = [text for text in built_in_texts(entries) if text_key(text) not in file.by_text]
    if stale:
        raise ZePTError(
            f"{len(stale)} descriptions were edited since their vectors were made, such as {stale[0][:60]!r}. Encode "
            f"them again: zept knowledge encode -o {file.path}"
        )
    kinds = [entry.kind for entry in entries]
    print(f"{kinds.count('organ')} organs and {kinds.count('tumor')} tumors: schema, names and vectors in order")
    return 0


def _check_dataset(dataset: str) -> int:
    from zept_nnunet.commands.taxonomy import find_dataset_json, read_dataset_json
    from zept_nnunet.knowledge.dataset import class_texts, declared_source
    from zept_nnunet.plans_block import model_texts, own_parts, places_of
    from zept_nnunet.taxonomy import Taxonomy, declared_unseen

    path = find_dataset_json(dataset)
    dataset_json = read_dataset_json(path)
    found = class_texts(dataset_json, str(path))
    source = declared_source(dataset_json, str(path))
    for name, description in found.items():
        print(f"{name}: {description.origin}: {textwrap.shorten(description.text, 100, placeholder=' …')}")
    _, training, anomalies = own_parts(dataset_json, "zept", str(path))
    # raises where one is missing
    vectors = source.vectors(found | model_texts(dataset_json, training, anomalies, str(path)))
    places = places_of(Taxonomy.from_dataset_json(dataset_json, str(path)))
    places |= {tumor.name: tumor.hosts for tumor in declared_unseen(dataset_json, str(path))}
    source.refuse_twins(vectors, places, found)
    print(f"\nevery class has a vector, by {source.name} (revision {source.revision})")
    return 0


def run_encode(args: argparse.Namespace) -> int:
    """Encode and write."""
    import numpy as np
    from tqdm import tqdm  # type: ignore[import-untyped]

    from zept_nnunet.commands.taxonomy import find_dataset_json, read_dataset_json
    from zept_nnunet.knowledge.dataset import class_texts
    from zept_nnunet.knowledge.encoders import HuggingFaceEncoder, TextEncoder, check_text
    from zept_nnunet.knowledge.source import encode, english_encoder, said_of
    from zept_nnunet.knowledge.texts import Description, built_in_texts, describe_abnormal
    from zept_nnunet.knowledge.vectors import write_vectors
    from zept_nnunet.taxonomy import Taxonomy

    if args.o.suffix != ".safetensors":
        raise ZePTError(f"-o {args.o}: the file's name must end in .safetensors")
    if args.o.is_dir() or not (parent := nearest_existing(args.o.parent)).is_dir():
        raise ZePTError(f"-o {args.o}: a file cannot be written there ({args.o if args.o.is_dir() else parent})")
    given = [("a built-in description", Description(text, "name")) for text in built_in_texts()]
    if args.d is not None:
        path = find_dataset_json(args.d)
        dataset_json = read_dataset_json(path)
        taxonomy = Taxonomy.from_dataset_json(dataset_json, str(path))
        found = [*class_texts(dataset_json, str(path)).items()]
        # whichever of them gets such a query
        found += [(f"abnormal {o.name}", describe_abnormal(taxonomy.reading(o.name))) for o in taxonomy.organs]
        given += [(f"{path}: the description of {name!r}", description) for name, description in found]
    given += [("--text", Description(text, "own")) for text in args.text]
    for where, description in given:  # before the first of them is encoded, which may take long
        with said_of(where):
            check_text(description.text, is_english=args.encoder is None, by_word=description.is_own)
    texts = {description.text: description for _, description in given}
    encoder: TextEncoder = english_encoder() if args.encoder is None else HuggingFaceEncoder(args.encoder)
    assert encoder.revision  # loads it, before the progress bar
    vectors = np.stack([encode(encoder, d) for d in tqdm(texts.values(), desc="encode", unit="text")])
    write_vectors(args.o, encoder.name, encoder.revision, [*texts], vectors)
    print(f"{len(texts)} vectors of width {encoder.width} by {encoder.name} (revision {encoder.revision}): {args.o}")
    print(f'to train with them, in dataset.json: "zept": {{"vectors": "{args.o.absolute()}"}}')
    return 0


def run_retrieve(args: argparse.Namespace) -> int:
    """Embed, rank, write and print."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from zept_nnunet.evaluation.retrieval import CONTROLS, plot_embeddings, retrieval_table, summarize, swapped
    from zept_nnunet.inference.embeddings import Embedder
    from zept_nnunet.inference.model_folder import read_json
    from zept_nnunet.knowledge import KnowledgeBank, built_in
    from zept_nnunet.knowledge.catalog import catalog
    from zept_nnunet.knowledge.vectors import text_key
    from zept_nnunet.plans_block import read_block
    from zept_nnunet.taxonomy import Taxonomy

    if not (there := nearest_existing(args.o)).is_dir():
        raise ZePTError(f"-o {args.o}: {there} is no folder; give another")
    block = read_block(read_json(args.m / "plans.json"), str(args.m / "plans.json"))
    taxonomy = Taxonomy.from_dict(block["taxonomy"])
    bank = KnowledgeBank.from_dict(block["knowledge"])
    own = {c.name: bank.matrix([c.name])[0] for c in taxonomy.classes}
    candidates = {"model's classes": own}
    known = built_in()
    if known.revision == bank.revision and known.file is not None:
        vectors = {e.name: known.file.by_text.get(text_key(e.text)) for e in catalog()}
        texts = {f"built-in: {n}": v for n, v in vectors.items() if v is not None}  # None: edited, not encoded yet
        matrix = np.stack([*own.values()])
        others = {n: v for n, v in texts.items() if np.abs(matrix - v).max(1).min() > 1e-4}  # not those of a class
        candidates["all descriptions"] = own | others
    else:
        print(f"the model's encoder is {bank.encoder}: only its own classes are compared")
    unseen = [t.name for t in taxonomy.tumors if t.added]
    device = torch.device(args.device)
    embedder = Embedder(args.m, args.f, args.chk, device)
    cases = list(tqdm(embedder.cases(args.i), desc="embed", unit="scan"))
    table = retrieval_table(cases, candidates, unseen)
    if table.empty:
        raise ZePTError(f"the model finds none of its classes in the images of {args.i}: there is nothing to compare")
    summary = summarize(
        table,
        retrieval_table(swapped(cases), candidates, unseen),
        retrieval_table(list(embedder.blank()), candidates, unseen, keep_missing=True),
    )
    with new_files(args.o, ("retrieval.csv", "summary.csv", "embeddings.png")) as scratch:
        table.to_csv(scratch / "retrieval.csv", index=False)
        summary.to_csv(scratch / "summary.csv", float_format="%.4f")
        plot_embeddings(cases, own, unseen, scratch / "embeddings.png")
    print(summary.round(3).to_string())
    print(textwrap.fill(CONTROLS, 110))
    print(f"written: {args.o}")
    return 0
