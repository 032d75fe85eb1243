from tests.server.harness import *
def test_smoke(server):
    print(get(server.http+"/health"), get(server.http+"/v1/models"))
    print(post(server.http+"/v1/completions", {"prompt":"hello","max_tokens":7,"logprobs":2,"echo":True}))
    print(post(server.http+"/v1/chat/completions", {"messages":[{"role":"user","content":"hi"}],"max_tokens":7,"logprobs":True}))
    for e in events(server.http+"/v1/chat/completions", {"messages":[{"role":"user","content":"hi"}],"max_tokens":7,"stream":True,"stream_options":{"include_usage":True}}): print(e)
    from jengine.client import Client, collect
    with Client(server.grpc) as c:
        print(c.server_info())
        print(collect(c.generate("hello", max_tokens=5, temperature=0)))
        print(list(c.chat([{"role":"user","content":"x"}], max_tokens=3)))
    print(get(server.http+"/metrics")[1][:3000])
