"""Our models in lm-eval, under the name `odelm`: importing this registers them, where lm-eval is installed.

    lm_eval --model odelm --model_args path=RUN,steps=3 --tasks FILE.yaml
    python -m odelm.evals.harness --model odelm --model_args path=RUN,steps=3 --tasks hellaswag

lm-eval imports no other packages by itself. It imports this one for a task given as a YAML file that names one of its
functions (`process_docs: !function odelm.evals.harness.unchanged`); the second command is lm-eval with this imported.
"""

from importlib.util import find_spec
from typing import TypeVar

__all__ = ["unchanged"]

Documents = TypeVar("Documents")

if find_spec("lm_eval") is not None:
    from odelm.evals.harness.model import HarnessModel as HarnessModel

    __all__ += ["HarnessModel"]


def unchanged(documents: Documents) -> Documents:
    """Returns a task's documents as they are: for its `process_docs`, so that lm-eval imports this package."""
    return documents
