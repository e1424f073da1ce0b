"""`relight`: one command for everything. Each sub-command's code is imported only when it is called."""

import importlib

import click

_COMMANDS = {
    "init": ("knative.project.cli", "init", "Make a project of your own, to run here and to bring to a cluster."),
    "run": ("knative.local.cli", "run", "Run a project, an agent or manifests on this machine."),
    "status": ("knative.local.commands", "status", "Show a running platform's Services, pods and queues."),
    "invoke": ("knative.local.commands", "invoke", "Send a request to a Service."),
    "logs": ("knative.local.commands", "logs", "Print the log of a pod or a queue source."),
    "send": ("knative.local.messages", "send", "Put messages into a queue."),
    "receive": ("knative.local.messages", "receive", "Take messages out of a queue and print them."),
    "simulate": ("knative.simulator.cli", "simulate", "Try a policy on a trace of requests before paying for it."),
    "cluster": ("knative.deploy.cli", "cluster", "Bring manifests to a cluster; what `make deploy` and its like do."),
    "queue-source": ("knative.queue_source.cli", "command", "Post a queue's messages to a sink, as CloudEvents."),
    "push": ("weights_cache.cli", "push", "Upload a directory of weights to object storage."),
    "pull": ("weights_cache.cli", "pull", "Bring weights into a node's cache."),
    "snapshot": ("weights_cache.cli", "snapshot", "Print which snapshot of weights the store has now."),
    "cache": ("weights_cache.cli", "cache_group", "See what is in a node's cache, check it, make room."),
    "convert": ("function.convert", "command", "Convert a llama model from GGUF to safetensors."),
}


# What a command needs besides the package itself.
_EXTRAS = {"run": "local", "simulate": "simulator", "cluster": "cluster"}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[name]
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if name not in _EXTRAS:
                raise
            raise click.ClickException(f"{name} needs another package ({error}): pip install 'relight[{_EXTRAS[name]}]'") from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_Lazy)
@click.version_option(package_name="relight")
def main() -> None:
    """Scale-to-zero model functions on Knative."""
