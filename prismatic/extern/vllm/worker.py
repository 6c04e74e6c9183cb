"""Brings the model class into vLLM's worker processes, whether or not the project is installed.

An engine with tensor parallelism starts a process for each GPU. vLLM's entry points tell them about the class, but only
of an installed distribution; with the project on PYTHONPATH alone there are none. Every worker imports the module of
its extension class before it builds the model.
"""

from prismatic.extern.vllm import register

register()


class WorkerExtension:
    """Adds nothing to a worker: importing its module is what counts."""
