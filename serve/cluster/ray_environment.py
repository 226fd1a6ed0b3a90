"""Environment variables of Ray's processes, each with the reason for its value.

`python -m serve` sets them itself. On a cluster they belong in the environment of every `ray start`, as in
configs/kuberay.yaml: Ray Serve reads them when its processes start, and its config file cannot hold them.

No ray: the variables must be set before it is imported.
"""

SERVE_ENVIRONMENT = {
    # Removes control headers, bounds bodies, re-sends the requests of a dead API server: serve/cluster/gate.py.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.cluster.gate:middlewares",
    # A killed proxy is replaced after three checks in a row have failed: 7 s instead of 30. The checks of one that has died fail
    # at once; the time limit is for one that is busy, on a machine that is, too: Ray kills it, and with it every connection.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
    # gRPC calls instead of Ray actor calls from proxy to API server and from API server to worker: 3.3 ms a call instead
    # of 5.6, ten streamed events 5.9 ms instead of 17 (medians, two busy cores), and a cancelled call ends at once.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Ray's default is nice 15, behind everything else on the machine: right for batch jobs, wrong for a server.
    "RAY_worker_niceness": "0",
    # Requests run on the replica's own event loop: 7.0 ms through proxy and API server instead of 11.2 (median, two busy
    # cores). None of our code blocks the loop; a worker computes in threads of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # 64 images of 256 pixels, or ten of 1,024, in one message; Ray's default is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
    # Numbers for the autoscaler, from every worker; Ray's default is 10 s.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # Serve's own lines go to its files; ours are one JSON line a request.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's processes reject every call without the cluster's token.
    "RAY_AUTH_MODE": "token",
}

# For clusters of several hosts, where the network between them can be partitioned.
CLUSTER_ENVIRONMENT = {
    # An unreachable host is detected after 3 checks of 1 s, not 5 of 10 s; until then new requests are sent to it, too.
    # Read by the head.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # A gRPC call to an unreachable host never returns, and neither would the request of a client whose proxy had called an
    # API server there. Ray's actor calls end when the host is detected; they cost 2 ms more a request. Between API server
    # and worker, serve/cluster/rerun.py watches for silence.
    "RAY_SERVE_PROXY_USE_GRPC": "0",
    # An API server that answers a proxy on an unreachable host blocks until the proxy reads the answer, and blocks all its
    # other answers, because Ray waits on the replica's own event loop. This bounds how long TCP keeps trying (Ray's
    # default is 120 s, in which every request of that API server ran into its deadline).
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_core_worker_rpc_server_reconnect_timeout_base_s": "1",
    "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "2",
}

# For a private Ray on one machine.
ONE_MACHINE_ENVIRONMENT = {
    # Meant for laptops with chatty firewalls; binds every listener of Ray's processes to 127.0.0.1.
    # `_node_ip_address="127.0.0.1"` alone is replaced by the machine's address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A model that cannot be loaded is reported after one attempt, not after three.
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
}
