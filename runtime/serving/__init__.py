"""An HTTP server that speaks OpenAI's protocol, on the standard library; one generation at a time.

requests -> what was asked for, checked      text    -> tokens to text, up to a stop string
engine   -> turns, sampling, the KV cache    replies -> JSON of answers        server  -> sockets and streams
"""
