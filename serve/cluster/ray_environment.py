"""What Ray reads from the environment of the processes that it starts, and why each value is what it is.

`python -m serve` sets these itself. For a cluster they belong into the environment of every `ray start`, as in
configs/kuberay.yaml: Ray Serve reads them when its processes start, and no config file of Serve can hold them.

No ray: the variables must be set before it is imported.
"""

SERVE_ENVIRONMENT = {
    # Strips headers with power, bounds bodies, sends the requests of a dead edge to another one: serve/cluster/gate.py.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.cluster.gate:middlewares",
    # A killed proxy is replaced after three checks in a row have failed: 7 s instead of 30.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "1",
    # From proxy to edge and from edge to worker as gRPC calls, not as Ray actor calls: one call 3.3 ms instead of 5.6,
    # ten streamed events 5.9 ms instead of 17 (medians, two busy cores), and a cancelled call ends at once.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Ray runs its workers at nice 15, behind everything else on the machine: right for batch jobs, wrong for a server.
    "RAY_worker_niceness": "0",
    # Requests on the replica's own event loop: 7.0 ms through proxy and edge instead of 11.2 (median, two busy cores).
    # Nothing of ours holds the loop; a worker's work has threads of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # 64 pictures of 256 pixels, or ten of 1,024, in one message; Ray's default is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
    # Numbers for the autoscaler, from every worker; Ray's default is 10 s.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # Serve's own lines go to its files; ours are one JSON line a request.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Nobody talks to Ray without its token.
    "RAY_AUTH_MODE": "token",
}

# Where there are several hosts, and one can be cut off from the others.
CLUSTER_ENVIRONMENT = {
    # It is found out after 3 checks of 1 s each, not 5 of 10 s: meanwhile new requests go there, too. Read by the head.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # A gRPC call to a host that is cut off waits for ever, and so would a client whose proxy had called an edge there.
    # Ray's own calls end when the host is found out; 2 ms a request dearer. From edge to worker serve/cluster/rerun.py watches.
    "RAY_SERVE_PROXY_USE_GRPC": "0",
    # An edge that is answering a proxy on a host that is cut off waits for it to take what was sent, and with it all that
    # the edge answers others: Ray waits on the replica's own event loop. This is for how long TCP goes on trying
    # (Ray's default: 120 s, in which every request of that edge ran into its deadline).
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_core_worker_rpc_server_reconnect_timeout_base_s": "1",
    "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "2",
}

# Ray on one machine, for nobody else.
ONE_MACHINE_ENVIRONMENT = {
    # Made for laptops with chatty firewalls, this makes every listener of Ray's processes take 127.0.0.1;
    # `_node_ip_address="127.0.0.1"` alone is changed back to the machine's address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A model that cannot be loaded is told after one try, not after three.
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",
}
