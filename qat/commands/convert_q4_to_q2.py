"""`qat convert-q4-to-q2`: a 4-bit student to one whose MLP layers have 2 bits."""

import time
from collections.abc import Sequence
from typing import Any

from qat.commands.door import run_command, say
from qat.convert.config import ConvertQ4ToQ2Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert-q4-to-q2", ConvertQ4ToQ2Config, act, argv)


def act(config: ConvertQ4ToQ2Config) -> dict[str, Any]:
    """Load both models, calibrate, fit the MLP layers, measure, write."""
    from dataclasses import replace

    from qat.commands.students import already_made, calibrate, measure_and_write, open_cache
    from qat.convert.q4_to_q2 import convert_mlp_layers, q2_scheme
    from qat.convert.recipe import finished, recipe
    from qat.device import Device
    from qat.model.checkpoint import read_header
    from qat.model.load import (
        checkpoint_folder,
        load_dense,
        load_model,
        load_tokenizer,
        model_identity,
    )
    from qat.model.surgery import layers_of_kind
    from qat.quant.scheme import Scheme

    started = time.perf_counter()
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    source = checkpoint_folder(config.q4_checkpoint)
    header = read_header(source)
    base_path = config.model_id or header.base_model["path"]
    base = load_dense(base_path, dtype=dtype)
    identity = model_identity(base_path, base)
    cache = open_cache(
        config.cache_dir, load_tokenizer(source), base.config.vocab_size, identity["weights"]
    )
    made_by = recipe(
        "convert-q4-to-q2",
        config,
        q4=header.sha256,
        base=identity["weights"],
        cache=cache and cache.fingerprint,
    )
    done = finished(config.output, made_by)
    if done is not None:
        return already_made(config.output, done)
    student, _header = load_model(source, dtype=dtype)
    linears = {name: base.get_submodule(name) for name in layers_of_kind(student, "mlp")}
    importance = calibrate(base, linears, cache, config.calibration_sequences, device)
    scheme = q2_scheme(Scheme.from_dict(header.scheme), config)
    convert_mlp_layers(
        student,
        scheme.mlp,
        weight_of=lambda name, _layer: base.get_submodule(name).weight,
        importance=importance,
    )
    header = replace(
        header,
        scheme=scheme.to_dict(),
        base_model={"path": base_path, **identity},
        cache_fingerprint=cache and cache.fingerprint,
        made_by=made_by,
    )
    return measure_and_write(
        student,
        header,
        config.output,
        cache=cache if config.eval else None,
        text_source=source,
        started=started,
        device=device,
        dtype=dtype,
    )
