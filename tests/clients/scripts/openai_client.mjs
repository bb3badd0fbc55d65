// What OpenAI's JavaScript client sees of a server: openai_client.mjs PACKAGES URL CHECK.
// PACKAGES: the directory that has node_modules; imports look beside this file otherwise.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [packages, url, check] = process.argv.slice(2);
const OpenAI = createRequire(`${packages}/package.json`)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", timeout: 300_000 });
const messages = [{ role: "user", content: "Who are you?" }];
const asked = { model: "demo", messages, temperature: 0, max_tokens: 12 };
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const long = { model: "demo", prompt: "Tom has", max_tokens: 4000, ignore_eos: true };

const checks = {
  async chat() {
    const answer = await client.chat.completions.create(asked);
    assert.match(answer.choices[0].message.content, /qnext demo/);
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 12);
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    assert.deepEqual(models, ["demo"]);
  },

  async stream() {
    const whole = await client.chat.completions.create(asked);
    const options = { stream: true, stream_options: { include_usage: true } };
    let text = "";
    let usage = null;
    for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, 12);
  },

  async completions() {
    const prompt = "Question: Tom has 3 pens.";
    const one = await client.completions.create({ model: "demo", prompt, temperature: 0 });
    assert.equal(one.usage.completion_tokens, 16);
    let text = "";
    const pieces = await client.completions.create({
      model: "demo", prompt, temperature: 0, stream: true,
    });
    for await (const chunk of pieces) text += chunk.choices[0].text;
    assert.equal(text, one.choices[0].text);
  },

  async tools() {
    const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
    const runner = client.chat.completions.stream({
      ...asked, max_tokens: undefined, tools, tool_choice: "required",
    });
    const [choice] = (await runner.finalChatCompletion()).choices;
    assert.equal(choice.finish_reason, "tool_calls");
    assert.equal(choice.message.tool_calls[0].function.name, "get_weather");
    const { city } = JSON.parse(choice.message.tool_calls[0].function.arguments);
    assert.ok(["Paris", "Rome"].includes(city));
  },

  async response_format() {
    const response_format = {
      type: "json_schema",
      json_schema: { name: "trip", strict: true, schema: parameters },
    };
    const answer = await client.chat.completions.create({
      ...asked, max_tokens: undefined, response_format,
    });
    assert.ok(["Paris", "Rome"].includes(JSON.parse(answer.choices[0].message.content).city));
  },

  async typed_errors() {
    await assert.rejects(client.chat.completions.create({ ...asked, temperature: -1 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
    const other = client.chat.completions.create({ ...asked, model: "gpt-x" });
    await assert.rejects(other, OpenAI.NotFoundError);
  },

  async abort_stream() {
    const controller = new AbortController();
    const options = { signal: controller.signal };
    let seen = 0, left = false;
    const chunks = await client.completions.create({ ...long, stream: true }, options);
    for await (const _ of chunks) {
      // what came in one read with the third is handed out before anything else runs; no more is
      assert.ok(!left, "a token came after the client had left");
      if (++seen === 3) {
        controller.abort();
        setImmediate(() => { left = true; });
      }
    }
    assert.ok(seen >= 3);
  },

  async abort_whole() {
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 1000);
    const answer = client.completions.create(long, { signal: controller.signal });
    await assert.rejects(answer, OpenAI.APIUserAbortError);
  },
};

await checks[check]();
