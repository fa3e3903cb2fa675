"""The process that measure.py starts for `--tasks`: `python -m calibration.evaluation.lm_eval_tasks REQUESTS ANSWERS`.

REQUESTS: a JSON file, a list of one object (measure.run_tasks). ANSWERS: a file that gets one JSON object on one line.
Nothing else imports this module, because it needs vLLM and lm-evaluation-harness.
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
        # With 0 the harness gives no standard errors at all, not even those that have a formula.
        bootstrap_iters=1000,
    )["results"]
    # The harness names a metric "acc,none": the metric and the filter of the answers.
    answer = {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in results.items()
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
