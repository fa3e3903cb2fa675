"""SmoothQuant for vLLM."""


def register(): ...
