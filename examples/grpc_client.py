"""A chat over jengine.v1.Inference, streamed. Start `jengine serve smollm2-135m` first.

python examples/grpc_client.py [HOST:PORT]
"""

import sys

from jengine.client import Client


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    with Client(target) as client:
        info = client.server_info()
        print(f"{info.served_names[0]}: {info.architecture}, {info.max_model_len} tokens")

        messages = [{"role": "user", "content": "Name three rivers in Europe."}]
        for delta in client.chat(messages, temperature=0.0, max_tokens=64):
            print(delta.text, end="", flush=True)
            if delta.finish is not None:
                first = delta.finish.time_to_first_token or 0.0
                print(f"\n{delta.finish.completion_tokens} tokens, the first after {first:.3f} s")

        # Leaving the loop cancels the call: the server frees the request's memory at once.
        for delta in client.generate("Counting: 1, 2, 3,", temperature=0.0, max_tokens=1000):
            print(delta.text, end="", flush=True)
            if "12" in delta.text:
                break
        print()


if __name__ == "__main__":
    main()
