"""`qat convert`: a student to another scheme, with what that costs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from qat.cli.command import run_command
from qat.pipelines.convert_config import ConvertConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("qat convert", ConvertConfig, act, argv)


def act(config: ConvertConfig) -> dict[str, Any]:
    """Open the student, fit what changes, measure before and after, write."""
    from qat.pipelines.students import reform
    from qat.quant.scheme import scheme_from_name

    scheme = scheme_from_name(config.scheme)
    change = partial(refit, config, scheme)
    return reform("convert", config, config.checkpoint, lambda _former: scheme, change)


def refit(config: ConvertConfig, scheme: Any, student: Any) -> dict[str, Any]:
    """Fit the layers whose scheme changes; return how many, and the change in their weights."""
    from qat.model.checkpoint import dense_parts_in
    from qat.model.surgery import quantized_layers
    from qat.pipelines import q4_to_q2
    from qat.pipelines.open_cache import open_teacher_cache
    from qat.pipelines.students import calibrate, calibration_tokens, loss_weights
    from qat.pipelines.to_scheme import layers_to_change, weight_sqnr_db
    from qat.runtime.device import Device

    schemes = layers_to_change(student, scheme)
    weight_of = q4_to_q2.weights_to_fit(student, lambda _name: None)
    q4_to_q2.check_weights(schemes, weight_of)
    device = Device.detect(config.device)
    dtype = device.dtype_from_name(config.dtype)
    cache = open_teacher_cache(config.cache_dir) if config.cache_dir else None
    count = config.num_calibration_sequences(cache.seq_len) if cache else 0
    with dense_parts_in(student, dtype):
        if config.fit != "moments" and cache:
            place = device.eager()
            batches = calibration_tokens(cache, count, place)
            with place.hosting(student):
                q4_to_q2.convert_layers_by_blocks(
                    student,
                    None,
                    schemes,
                    batches,
                    weight_of=weight_of,
                    token_weights=loss_weights(config.fit, student, schemes, batches),
                    dtype=dtype,
                )
        else:
            layers = quantized_layers(student)
            watched = {name: layers[name] for name in schemes}
            moments = calibrate(student, watched, cache, count, device)
            q4_to_q2.convert_layers(student, schemes, weight_of=weight_of, importance=moments)
    sqnr = weight_sqnr_db(student, list(schemes), weight_of)
    return {"layers_changed": len(schemes), "weight_sqnr_db": sqnr}


if __name__ == "__main__":
    raise SystemExit(main())
