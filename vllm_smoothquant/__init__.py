"""SmoothQuant W8A8 INT8 for vLLM: the plugin. `register` is the `vllm.general_plugins` entry point.

Importing this package or its `format` imports neither vLLM nor transformers: a calibration host needs no vLLM.
"""

import logging

# pyproject.toml declares the same range. kernels/select.py and config.py list the differences inside it.
SUPPORTED_VLLM = ">=0.26,<0.34"


def supports(version: str) -> bool:
    """Whether `version` of vLLM is in SUPPORTED_VLLM. "dev", the version of an untagged source tree, is accepted."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) in SpecifierSet(SUPPORTED_VLLM, prereleases=True)
    except InvalidVersion:
        return True


def register() -> None:
    """Register the quantisation method "smoothquant". vLLM calls this in every process; calling it again is harmless.

    Outside SUPPORTED_VLLM it logs one line. Other models keep working, and a SmoothQuant checkpoint is refused.
    """
    from vllm.version import __version__

    from .format.config import QUANT_METHOD

    supported = supports(__version__)
    logger = logging.getLogger("vllm.smoothquant")
    if not supported:
        text = "vllm-smoothquant is for vLLM %s, this is %s: SmoothQuant checkpoints are refused"
        logger.warning(text, SUPPORTED_VLLM, __version__)
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        register_method = register_quantization_config(QUANT_METHOD)
        if supported:
            from .config import SmoothQuantVllmConfig

            register_method(SmoothQuantVllmConfig)
        else:
            register_method(_refusing(__version__))
    except (ImportError, AttributeError, TypeError) as error:
        if supported:
            raise
        # An unknown vLLM may lack these names. An exception here would make vLLM refuse every model.
        logger.warning("the refusal could not be registered: %s", error)


def _refusing(version: str) -> type:
    """A stand-in for SmoothQuantVllmConfig that answers every use with a SmoothQuantError."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from .format.errors import SmoothQuantError

    def refuse(*_: object, **__: object) -> object:
        raise SmoothQuantError(
            "vllm", f"a version {SUPPORTED_VLLM}", version, "install a supported vLLM, or upgrade vllm-smoothquant"
        )

    # Abstract methods differ between versions. All must be defined, because Python otherwise fails before `__init__`.
    body: dict[str, object] = dict.fromkeys(QuantizationConfig.__abstractmethods__, refuse)
    body |= {"__init__": refuse, "from_config": classmethod(refuse), "get_config_filenames": staticmethod(list)}
    return type("UnsupportedVllm", (QuantizationConfig,), body)
