// A gRPC client in TypeScript that knows nothing of Moiety but its protos: node grpc.js ACTION ADDRESS, with the path of
// generation.proto in PROTO. Prints what it saw, as one line of JSON.
import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

interface Message {
  text: string;
  token_ids: number[];
  finish_reason: string;
  usage: { completion_tokens: number } | null;
  timings: object | null;
}

interface Service extends grpc.Client {
  Generate(request: object, options: grpc.CallOptions): grpc.ClientReadableStream<Message>;
  ListModels(request: object, done: grpc.requestCallback<{ models: { name: string }[] }>): grpc.ClientUnaryCall;
}

const definition = loadSync(process.env.PROTO!, { keepCase: true, enums: String, defaults: true });
const loaded = grpc.loadPackageDefinition(definition) as any;
const [action, address] = process.argv.slice(2);
const client: Service = new loaded.moiety.v1.GenerationService(address, grpc.credentials.createInsecure());

function generate(sampling: object, others: object = {}): grpc.ClientReadableStream<Message> {
  return client.Generate({ text: "Each expert", sampling, ...others }, { deadline: Date.now() + 20_000 });
}

function models(): Promise<string[]> {
  return new Promise((resolve, reject) =>
    client.ListModels({}, (error, answer) => (error ? reject(error) : resolve(answer!.models.map((model) => model.name)))),
  );
}

async function stream(): Promise<object> {
  const messages: Message[] = [];
  for await (const message of generate({ temperature: 0.9, seed: 3, max_tokens: 12 })) messages.push(message);
  const last = messages.at(-1)!;
  return {
    models: await models(),
    text: messages.map((message) => message.text).join(""),
    ids: messages.flatMap((message) => message.token_ids),
    reason: last.finish_reason,
    completion_tokens: last.usage!.completion_tokens,
    timed: last.timings !== null,
  };
}

function failure(call: grpc.ClientReadableStream<Message>, onMessage: () => void = () => {}): Promise<object> {
  return new Promise((resolve) => {
    call.on("data", onMessage);
    call.on("end", () => resolve({ code: "OK" }));
    call.on("error", (error) => {
      const { code, details, metadata } = error as grpc.ServiceError;
      const retry = metadata.get("retry-after-ms").map(String);
      resolve({ code: grpc.status[code], details, ...(retry.length ? { "retry-after-ms": retry[0] } : {}) });
    });
  });
}

function cancel(): Promise<object> {
  const call = generate({ max_tokens: 1000, ignore_eos: true });
  return failure(call, () => call.cancel());
}

const actions: Record<string, () => Promise<object>> = {
  stream,
  cancel,
  wrong: () => failure(generate({ temperature: 99 })),
  unknown: () => failure(generate({}, { model: "other" })),
  refused: () => failure(generate({ max_tokens: 1 })),
};

console.log(JSON.stringify(await actions[action]()));
client.close();
