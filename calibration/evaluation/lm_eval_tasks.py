"""The process that evaluate.py starts for `--tasks`: `python -m calibration.evaluation.lm_eval_tasks REQUEST ANSWER`,
two JSON files.

Nothing else imports this module: it needs vLLM and lm-evaluation-harness.
"""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main() -> None:
    """Answer task -> metric -> value: every number that the harness reports, standard errors included."""
    (request,) = json.loads(Path(sys.argv[1]).read_text())
    results = simple_evaluate(
        model="vllm",
        model_args={"pretrained": request["model"], **request["engine"]},
        tasks=request["tasks"],
        task_manager=TaskManager(include_path=request["include_path"]),
        limit=request["limit"],
        bootstrap_iters=0,
    )["results"]
    # The harness names a metric "acc,none": by what it filtered the answers with.
    answer = {
        task: {
            name.removesuffix(",none"): value for name, value in metrics.items() if "," in name and _is_number(value)
        }
        for task, metrics in results.items()
    }
    Path(sys.argv[2]).write_text(json.dumps([answer]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    main()
