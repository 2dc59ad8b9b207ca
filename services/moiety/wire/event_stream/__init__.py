"""Both ends of the stream between a gateway and a router: calls are sent one by one, and their events in batches.

Each message costs the router about 0.1 ms and the gateway as much, whatever its size. The router's engine loses that time,
because it is a thread of the same Python interpreter. So a router sends the events of a step together, at most
MESSAGE_EVENTS in one message.

While calls are open, a router sends at least every BEAT_S. gRPC 1.85 can forget a stream whose connection has ended, for
example while the gateway was stopped: the stream then neither yields nor fails. A gateway breaks a stream that is silent.

Neither end collects without bound for a reader that is too slow. A gateway that does not read loses its stream; a client
that does not read loses its request.
"""
