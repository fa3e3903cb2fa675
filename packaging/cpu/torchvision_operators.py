"""Let PyPI's torchvision work beside a CPU torch. Run by packaging/install.sh with the environment's python.

PyPI's build has its compiled operators for CUDA alone: they do not load, and `import torchvision` then fails where it
describes two of them. Image processors need none of them. This file copies itself into the environment, where Python
imports it at each start (.pth); it declares the two operators just before torchvision is imported. Calling one raises.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in OPERATORS:
                torch.library.define(f"torchvision::{operator}", SCHEMA)


if __name__ == "__main__":
    import shutil
    import sysconfig
    from pathlib import Path

    folder = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, folder / "torchvision_operators.py")
    (folder / "torchvision_operators.pth").write_text("import torchvision_operators\n")
else:
    sys.meta_path.insert(0, _BeforeTorchvision())
