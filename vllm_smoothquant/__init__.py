"""SmoothQuant W8A8 INT8 for vLLM: the plugin. `register` is the `vllm.general_plugins` entry point.

Importing this package, `checkpoint` or `int8` imports neither vLLM nor transformers; a calibration host needs no vLLM.
"""

import logging

# pyproject.toml declares the same range; what differs inside it is listed in kernels.py and config.py.
SUPPORTED_VLLM = ">=0.26,<0.34"


def supports(version: str) -> bool:
    """Whether `version` of vLLM is one of SUPPORTED_VLLM. An untagged source tree calls itself "dev", and is taken:
    whoever builds one knows which revision it is."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) in SpecifierSet(SUPPORTED_VLLM, prereleases=True)
    except InvalidVersion:
        return True


def register() -> None:
    """Teach vLLM the quantisation method "smoothquant". vLLM calls it in every process; calling it again is harmless.

    Outside SUPPORTED_VLLM it says so in one line; other models go on working, and a SmoothQuant checkpoint is refused.
    """
    from vllm.version import __version__

    from .format.config import QUANT_METHOD

    if supports(__version__):
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .config import SmoothQuantVllmConfig

        register_quantization_config(QUANT_METHOD)(SmoothQuantVllmConfig)
        return

    logger = logging.getLogger("vllm.smoothquant")
    logger.warning(
        "vllm-smoothquant is for vLLM %s, this is %s: SmoothQuant checkpoints are refused", SUPPORTED_VLLM, __version__
    )
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        register_quantization_config(QUANT_METHOD)(_refusing(__version__))
    except (ImportError, AttributeError, TypeError) as error:
        # Of such a vLLM nothing is known. It would refuse every model if this did not return.
        logger.warning("nor can they be refused by name: %s", error)


def _refusing(version: str) -> type:
    """A stand-in for SmoothQuantConfig which answers every use with one line."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from .format.errors import SmoothQuantError

    def refuse(*_: object, **__: object) -> object:
        raise SmoothQuantError(
            "vllm", f"a version {SUPPORTED_VLLM}", version, "install a supported vLLM, or upgrade vllm-smoothquant"
        )

    # Abstract methods may differ between versions; none is reached, but all must be there for `__init__` to be.
    body: dict[str, object] = dict.fromkeys(QuantizationConfig.__abstractmethods__, refuse)
    body |= {"__init__": refuse, "from_config": classmethod(refuse), "get_config_filenames": staticmethod(list)}
    return type("UnsupportedVllm", (QuantizationConfig,), body)
