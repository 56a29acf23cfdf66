"""BLIP-2 over HTTP: docs/serving.md says what clients and operators see.

    server          the first process, signals     chat, replies  OpenAI's requests and answers
    http_processes  further ones that speak HTTP   exchange       one request's answer
    together        what all of those count        pictures       decoded by processes, kept by content
    listening       the socket, uvicorn            fetch          pictures from the web
    front           ids, keys, the log             engine         the process with the engines
    app             the routes                     replicas       many of all this, on Ray
    client, many    what `run.py --server` asks with

Three kinds of process: some speak HTTP and never import torch; one has the engines; a few decode
pictures. What they send one another are `frames`; pixels lie in `slots`.
"""
