"""A cloud queue's messages as CloudEvents, posted to a sink: nothing is lost, and almost nothing is done twice.

In the order of the story: `queue` (the port, with `sqs` and `rabbitmq` behind it) → `source` (what is held, by whom and how long) →
`event` (a message as an event; `unwrap`, `claim`) → `sink` (one post) → `verdict` (what its answer means for the message) → `results`.
"""
