"""`qat init-student`: a full-precision model to a student."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from qat.cli.command import run_command
from qat.pipelines.quantize_config import InitStudentConfig
from qat.tracking.messages import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat init-student", InitStudentConfig, act, argv)


def act(config: InitStudentConfig) -> dict[str, Any]:
    """Load, calibrate, fit, measure, write."""
    from qat.model.checkpoint import CheckpointHeader
    from qat.model.load import (
        base_weights,
        load_dense,
        model_folder,
        model_identity,
        vocabulary_size,
    )
    from qat.model.surgery import check_scheme, quantizable_linears
    from qat.pipelines.fit_layers import check_weights
    from qat.pipelines.quantize import init_student, init_student_by_blocks
    from qat.pipelines.recipe import finished, recipe
    from qat.pipelines.students import (
        already_made,
        calibrate,
        calibration_tokens,
        loss_weights,
        measure_and_write,
        open_cache,
        write_student,
    )
    from qat.quant.scheme import scheme_from_name
    from qat.runtime.device import Device

    started = time.perf_counter()
    scheme = scheme_from_name(config.scheme)
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    say(device.describe())
    base = model_identity(config.model)
    cache = open_cache(
        config.cache_dir,
        model_folder(config.model),
        vocabulary_size(config.model),
        base["weights"],
    )
    made_by = recipe(
        "init-student", config, base=base["weights"], cache=cache and cache.fingerprint
    )
    done = finished(config.output, made_by)
    if done is not None:
        return already_made(config.output, done)
    model = load_dense(config.model, dtype=dtype)
    check_scheme(model, scheme)
    linears = quantizable_linears(model, scheme)
    check_weights(linears, scheme.layer)
    say(f"scheme {scheme.name}: {len(linears)} layers of {base['name']}")
    count = config.num_calibration_sequences(cache.seq_len) if cache is not None else 0
    if config.fit != "moments" and cache is not None:
        place = device.eager()
        batches = calibration_tokens(cache, count, place)
        with place.hosting(model):
            token_weights = loss_weights(config.fit, model, linears, batches)
            init_student_by_blocks(model, scheme, batches, token_weights=token_weights, dtype=dtype)
    else:
        init_student(model, scheme, importance=calibrate(model, linears, cache, count, device))
    header = CheckpointHeader(
        scheme=scheme.to_dict(),
        base_model={"path": config.model, **base},
        cache_fingerprint=cache and cache.fingerprint,
        made_by=made_by,
    )
    return measure_and_write(
        model,
        header,
        config.output,
        cache=cache if config.eval else None,
        write=partial(
            write_student,
            text_source=model_folder(config.model),
            weight_of=base_weights(config.model, base),
        ),
        started=started,
        device=device,
        dtype=dtype,
    )
