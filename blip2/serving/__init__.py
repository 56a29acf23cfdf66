"""BLIP-2 over HTTP: docs/serving.md says what clients and operators see.

    server    sockets, signals         chat, replies  OpenAI's requests and answers
    front     ids, keys, the log       pictures       decoded by processes, kept by content
    app       the routes               fetch          pictures from the web
    exchange  one request's answer     engine         the process with the engines
    replicas  many of all this, on Ray client, many   what `run.py --server` asks with

Three kinds of process: this one speaks HTTP and never imports torch; one has the engines; a few decode
pictures. What they send one another are `frames`; pixels lie in `slots`.
"""
