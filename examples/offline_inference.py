"""Offline batches. A script written for vLLM: only the import differs.

python examples/offline_inference.py [MODEL]
"""

import sys

from jengine import LLM, SamplingParams

PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


def main() -> None:
    llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", max_model_len=2048)
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=0)
    outputs = llm.generate(PROMPTS, sampling_params)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")

    conversation = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write one sentence about the sea."},
    ]
    (reply,) = llm.chat(conversation, SamplingParams(temperature=0.0, max_tokens=48))
    print(f"Chat: {reply.outputs[0].text!r}")


if __name__ == "__main__":
    main()
