"""What each command takes and calls: a config, whose docstrings are its help, and a pipeline."""

from collections.abc import Sequence
from importlib import import_module

from qat.cli.command import run_command

# Config in qat and function in qat.pipelines, imported when the command runs.
PIPELINES = {
    "fetch": ("pipelines.fetch:FetchConfig", "fetch:fetch"),
    "train-tokenizer": (
        "data.config:TrainTokenizerConfig",
        "train_tokenizer:train_tokenizer",
    ),
    "tokenize": ("data.config:TokenizeConfig", "tokenize_text:tokenize"),
    "pretrain": ("train.pretrain_config:PretrainConfig", "pretrain:pretrain"),
    "tune": ("train.tune_config:TuneConfig", "tune:tune"),
    "build-cache": ("cache.config:BuildCacheConfig", "build_cache:build_cache"),
    "inspect-cache": ("cache.config:InspectCacheConfig", "inspect_cache:inspect_cache"),
    "convert-cache": ("cache.config:ConvertCacheConfig", "convert_cache:convert_cache"),
    "pack": ("pipelines.pack:PackConfig", "pack:pack"),
    "push": ("pipelines.push:PushConfig", "push:push"),
    "compress": ("pipelines.compress_config:CompressConfig", "compress:compress"),
    "frontier": ("pipelines.compress_config:FrontierConfig", "frontier:frontier"),
    "plan": ("pipelines.quantize_config:PlanConfig", "plan:plan"),
    "init-student": ("pipelines.quantize_config:InitStudentConfig", "quantize:quantize"),
    "convert-q4-to-q2": (
        "pipelines.quantize_config:ConvertQ4ToQ2Config",
        "convert:convert_q4_to_q2",
    ),
    "convert-v1-to-v2": (
        "pipelines.quantize_config:ConvertV1ToV2Config",
        "students:convert_v1_to_v2",
    ),
    "snap-fp16": ("pipelines.quantize_config:SnapFp16Config", "students:snap_fp16"),
    "convert": ("pipelines.quantize_config:ConvertConfig", "convert:convert"),
    "train": ("train.config:TrainConfig", "train:train"),
    "evaluate": ("evaluate.config:EvaluateConfig", "evaluate:evaluate"),
    "generate": ("evaluate.generate_config:GenerateConfig", "generate:generate"),
    "export": ("export.config:ExportConfig", "export:export"),
    "parity": ("export.parity_config:ParityConfig", "parity:check_parity"),
    "benchmark": ("benchmark.config:BenchmarkConfig", "benchmark:benchmark"),
    "bench": ("benchmark.config:BenchConfig", "bench:bench"),
    "log-run": ("reports.log:LogRunConfig", "log_run:log_run"),
    "compare": ("reports.compare:CompareConfig", "compare:compare"),
    "doctor": ("pipelines.doctor:DoctorConfig", "doctor:examine"),
    "demo": ("pipelines.demo_config:DemoConfig", "demo:demo"),
}
# By the processes that torchrun starts.
SHARED = (
    "build-cache",
    "init-student",
    "convert",
    "train",
    "pretrain",
    "tune",
    "compress",
    "evaluate",
    "benchmark",
)


def config_of(name: str) -> type:
    """Return the config of a command, whose docstring says what the command does."""
    module, _, config = PIPELINES[name][0].partition(":")
    return getattr(import_module(f"qat.{module}"), config)


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command on these flags, those of the process when not given; return its exit code."""
    pipeline = f"qat.pipelines.{PIPELINES[name][1]}"
    return run_command(
        f"qat {name}",
        config_of(name),
        pipeline,
        argv,
        has_config_flag=name in ("train", "pretrain", "tune"),
        is_shared=name in SHARED,
    )
