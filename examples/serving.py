"""Ask a mixture that is served, beside its base model, through OpenAI's API.

moelora serve runs/quickstart/adapter --port 8000        # in another terminal, until it says "Serving on ..."
python examples/serving.py --url http://127.0.0.1:8000/v1 --prompt "def read_lines(path):"
"""

import argparse
import sys

from openai import APIConnectionError, OpenAI  # pip install openai; `moelora[serve]` and vLLM bring it along


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="as the server printed it")
    parser.add_argument("--prompt", default="def read_lines(path):")
    parser.add_argument("--max-tokens", type=int, default=40)
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key="none")
    try:
        names = [model.id for model in client.models.list()]
    except APIConnectionError:
        sys.exit(f"nobody answers at {options.url}; start `moelora serve FOLDER`, and give its address as --url")
    # The base and every adapter are models of the server; requests for all of them run side by side.
    for name in names:
        answer = client.completions.create(
            model=name, prompt=options.prompt, max_tokens=options.max_tokens, temperature=0
        )
        print(f"{name}:\n{options.prompt}{answer.choices[0].text}\n")

    # A chat takes the model's chat template; the answer comes as it is made.
    adapter = names[-1]
    stream = client.chat.completions.create(
        model=adapter,
        messages=[{"role": "user", "content": options.prompt}],
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
    )
    print(f"{adapter}, in a chat:")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
