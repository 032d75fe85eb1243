"""Replicas on the nodes of a Ray cluster: `python replicas.py MODEL --hosts 2 --per-host 4`.

Ray places one supervisor on each node and notices when one is gone; requests do not pass through
it. What the supervisors mean by their exit codes is docs/deployment.md's: after 75 they are started
anew on all nodes, after 78 nothing would help. SIGTERM and Ctrl-C drain.
"""

import argparse
import signal
import subprocess
import sys
import time

RESTART, CONFIG = 75, 78
PAUSE_SECONDS = 5.0


def command_of(model: str, num_hosts: int, per_host: int, host: int, more: list[str]) -> list[str]:
    """What one node runs."""
    return [
        *(sys.executable, "-m", "jengine.server", "serve", f"--model={model}"),
        "--host=0.0.0.0",
        "--data-parallel-multi-port-external-lb",
        f"--data-parallel-size={num_hosts * per_host}",
        f"--data-parallel-size-local={per_host}",
        f"--nnodes={num_hosts}",
        f"--node-rank={host}",
        "--log-format=json",
        "--follow-stdin",
        *more,
    ]


class Host:
    """An actor: one node's supervisor as its child."""

    def start(self, command: list[str]) -> str:
        import ray

        # Never written to: its end of file tells the supervisor that the actor is gone.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        return ray.util.get_node_ip_address()

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait()


def serve_once(options: argparse.Namespace, more: list[str]) -> int:
    """One life of the deployment; returns the exit code of the whole."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": 1.0, **({"GPU": float(options.per_host)} if options.gpus else {})}
    strategy = "STRICT_SPREAD" if options.spread else "PACK"
    group = placement_group([bundle] * options.hosts, strategy=strategy)
    ray.get(group.ready())
    hosts = []
    for index in range(options.hosts):
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        gpus = {"num_gpus": bundle["GPU"]} if options.gpus else {}
        actor = ray.remote(num_cpus=1, max_concurrency=2, **gpus)(Host)
        hosts.append(actor.options(scheduling_strategy=where).remote())
    try:
        for index, host in enumerate(hosts):
            command = command_of(options.model, options.hosts, options.per_host, index, more)
            address = ray.get(host.start.remote(command))
            print(f"host {index}: {address}", flush=True)
        while True:
            codes = ray.get([host.poll.remote() for host in hosts])
            if any(code is not None for code in codes):
                return next(code for code in codes if code is not None)
            time.sleep(1.0)
    except ray.exceptions.RayActorError as error:
        print(f"a node is gone: {error}", file=sys.stderr)
        return RESTART
    finally:
        for host in hosts:
            try:
                ray.get(host.stop.remote())
            except ray.exceptions.RayActorError:
                continue  # it is gone already
        remove_placement_group(group)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--per-host", type=int, default=1, help="replicas on each")
    parser.add_argument("--gpus", action="store_true", help="one for each replica")
    parser.add_argument("--no-spread", dest="spread", action="store_false", help="hosts may share")
    options, more = parser.parse_known_args()
    import ray

    ray.init()
    # After ray.init, which has handlers of its own; SIGINT may be ignored where we were started.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        while (code := serve_once(options, more)) == RESTART:
            time.sleep(PAUSE_SECONDS)
    except KeyboardInterrupt:
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
