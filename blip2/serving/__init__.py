"""BLIP-2 over HTTP: docs/serving.md says what clients and operators see.

    app          HTTP in and out        chat         OpenAI's requests and answers
    server       sockets, signals       pictures     decoded by processes, kept by content
    engine       the engines' process   fetch        pictures from the web
    metrics      numbers for Prometheus client       what `run.py --server` asks with

Three kinds of process: this one speaks HTTP and never imports torch; one has the engines; a few decode
pictures. What they send one another are `frames`.
"""
