# Sourced on every machine by the start commands of local.yaml and gpu.yaml, and before `serve deploy`.
# Machine facts live here, so that serve.yaml is the same on a laptop and on a cluster; edit them here.

# On a worker `ray up` exports RAY_HEAD_IP; on the head itself it does not.
export HEAD_ADDRESS="${RAY_HEAD_IP:-$(hostname -I | cut -d' ' -f1)}"
export REDIS_PORT=6390 # Ray's own control store has 6379
export REDIS_PASSWORD="$(cat ~/.moiety/redis_password)"

# Explicit in every process: unset, it depends on whether a token file happens to exist.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0

export MOIETY_MODEL=/models/moiety # the checkpoint folder, at the same path on every machine
export MOIETY_REGISTRY="redis://:${REDIS_PASSWORD}@${HEAD_ADDRESS}:${REDIS_PORT}/0"
export MOIETY_LISTEN_HOST=0.0.0.0 # other machines must reach the services: keep outsiders away by firewall
