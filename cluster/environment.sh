# Sourced on every machine by the start commands of local.yaml and gpu.yaml, and before `serve deploy`.
# What depends on the machines is set here, so that serve.yaml is the same on a laptop and on a cluster. Edit it here.

# `ray up` exports RAY_HEAD_IP on workers, not on the head. Where the head's first address is not the one that the launcher
# file names, write that one here instead.
export HEAD_ADDRESS="${RAY_HEAD_IP:-$(hostname -I | cut -d' ' -f1)}"
# Neither port is 6379, where a distribution's own redis-server listens.
export RAY_HEAD_PORT=6380 # of Ray's control store
export REDIS_PORT=6390
export REDIS_PASSWORD="$(cat ~/.moiety/redis_password)"

# Set in every process: if unset, the mode depends on whether a token file exists.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0

export MOIETY_MODEL=/models/moiety # the checkpoint folder, at the same path on every machine
export MOIETY_REGISTRY="redis://:${REDIS_PASSWORD}@${HEAD_ADDRESS}:${REDIS_PORT}/0"
export MOIETY_LISTEN_HOST=0.0.0.0 # other machines must reach the services; keep outsiders out with a firewall
