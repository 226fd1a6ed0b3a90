"""Default sampling parameters of a model, generation_config.json of its folder."""

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from engine.config.section import Section
from engine.errors import InputError
from engine.sampling_params import FIELDS, GENERATION_FIELDS, SamplingParams


def _sampling_field(name: str) -> Any:
    """A sampling parameter with the default, bounds and description that `engine.sampling_params` states."""
    spec = FIELDS[name]
    least = 0 if spec.takes_zero else spec.least
    return Field(spec.default, ge=least, le=spec.greatest, description=f"{spec.description}; {spec.range_text}")


class GenerationConfig(Section):
    """Sampling parameters of a model where a request states none: generation_config.json of its folder."""

    temperature: float = _sampling_field("temperature")
    top_k: int | None = _sampling_field("top_k")
    top_p: float | None = _sampling_field("top_p")
    guidance_scale: float = _sampling_field("guidance_scale")

    @field_validator(*GENERATION_FIELDS)
    @classmethod
    def _in_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        """Also between 0 and the least value, which `ge` lets through."""
        try:
            return FIELDS[str(info.field_name)].check(value)
        except InputError as error:
            raise ValueError(error.remedy) from error

    def sampling_params(self) -> SamplingParams:
        """With the engine's defaults of seed and candidates."""
        return SamplingParams(**self.model_dump())
