from importlib import import_module
from typing import get_type_hints

import pytest

from qat.cli.commands import PIPELINES


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_takes_the_config_of_its_command(name):
    """The flags that are parsed are what the function is annotated with, from its own module."""
    (config_module, config), (module, function) = (part.split(":") for part in PIPELINES[name])
    config_type = getattr(import_module(f"qat.{config_module}"), config)
    pipeline = getattr(import_module(f"qat.pipelines.{module}"), function)
    assert get_type_hints(pipeline)["config"] is config_type
