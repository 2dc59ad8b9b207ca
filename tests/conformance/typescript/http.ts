// The official openai package against the HTTP API: node http.js ACTION HOST:PORT. Prints what it saw, as one line of JSON.
import OpenAI from "openai";

const [action, address] = process.argv.slice(2);
const options = { baseURL: `http://${address}/v1`, apiKey: "none", maxRetries: 0 };
const client = new OpenAI(options);
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Hello" }];
const asked = { model: "fake", messages, max_completion_tokens: 8, seed: 2 };
const tools: OpenAI.ChatCompletionTool[] = [
  { type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } } },
];

async function stream(): Promise<object> {
  const models: string[] = [];
  for await (const model of client.models.list()) models.push(model.id);
  const whole = await client.chat.completions.create(asked);
  let text = "";
  let usage: OpenAI.CompletionUsage | null | undefined;
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return {
    models,
    text,
    same: text === whole.choices[0].message.content,
    reason: whole.choices[0].finish_reason,
    tokens: usage?.completion_tokens,
  };
}

async function tool(): Promise<object> {
  const runner = client.chat.completions.stream({ model: "fake", messages, tools });
  const answer = await runner.finalChatCompletion();
  const [choice] = answer.choices;
  const calls = (choice.message.tool_calls ?? []).flatMap((call) =>
    call.type === "function" ? [[call.function.name, JSON.parse(call.function.arguments)]] : [],
  );
  return { reason: choice.finish_reason, calls };
}

async function cancel(): Promise<object> {
  const answer = await client.chat.completions.create({ ...asked, stream: true });
  let seen = 0;
  for await (const _ of answer) {
    seen += 1;
    answer.controller.abort();
  }
  return { seen };
}

async function failure(make: () => Promise<unknown>): Promise<object> {
  try {
    await make();
  } catch (error) {
    if (error instanceof OpenAI.APIError) {
      const { name } = error.constructor;
      return { name, status: error.status, param: error.param, code: error.code, retry: error.headers?.get("retry-after-ms") ?? null };
    }
    throw error;
  }
  return { name: null };
}

const actions: Record<string, () => Promise<object>> = {
  stream,
  tool,
  cancel,
  wrong: () => failure(() => client.chat.completions.create({ ...asked, temperature: 99 })),
  unknown: () => failure(() => client.chat.completions.create({ ...asked, model: "other" })),
  refused: () => failure(() => client.chat.completions.create(asked)),
  patient: async () => {
    const answer = await new OpenAI({ ...options, maxRetries: 8 }).chat.completions.create(asked);
    return { reason: answer.choices[0].finish_reason };
  },
};

console.log(JSON.stringify(await actions[action]()));
