"""The Lua scripts of `redis.py`. Each makes one read or write atomic. They need Redis 5 or Valkey, or newer.

Scripts that read use `pcall` to prune, so they answer also where Redis refuses writes.

The braces in `moiety:{<app>}:<key>:` keep all keys in one Redis Cluster slot, so a script may build key names from a prefix.
"""

# KEYS: prefix of a system's keys. ARGV: id, ms for `beat:<id>` to live, ms for `replica:<id>`, the sets that must have the id.
# -> the digest in `beat:<id>`, or nil if a part of the entry is missing: it expired, or Redis has evicted it.
RENEW = """
local beat, whole = KEYS[1] .. 'beat:' .. ARGV[1], true
if redis.call('PEXPIRE', beat, ARGV[2]) == 0 then whole = false end
if redis.call('PEXPIRE', KEYS[1] .. 'replica:' .. ARGV[1], ARGV[3]) == 0 then whole = false end
for set = 4, #ARGV do
  if redis.call('SISMEMBER', KEYS[1] .. ARGV[set], ARGV[1]) == 0 then whole = false end
end
return whole and redis.call('GET', beat)
"""

# KEYS: a set of ids. ARGV: prefix of their keys, digest of an earlier answer, prefixes of keys to delete with a pruned id.
# -> [digest] if the answer is still the same, else [digest, id, value, id, value, …]. An id whose key has expired, or has
# the wrong type, leaves the set. All this is one step, so that a key renewed in between cannot be pruned.
READ_ENTRIES = """
local ids, found = redis.call('SMEMBERS', KEYS[1]), {''}
for first = 1, #ids, 1000 do
  local keys = {}
  for index = first, math.min(first + 999, #ids) do keys[#keys + 1] = ARGV[1] .. ids[index] end
  for offset, value in ipairs(redis.call('MGET', unpack(keys))) do
    local id = ids[first + offset - 1]
    if value then
      found[#found + 1] = id
      found[#found + 1] = value
    else
      redis.pcall('SREM', KEYS[1], id)
      for prefix = 3, #ARGV do redis.pcall('DEL', ARGV[prefix] .. id) end
    end
  end
end
found[1] = redis.sha1hex(table.concat(found, ' '))
if found[1] == ARGV[2] then return {found[1]} end
return found
"""

# KEYS: a set of ids. ARGV: key prefix, number of fields, their names (`stamp` first), then id, stamp of each known entry.
# -> [id, its stamp if that is known, else [field value or nil, …], …]. Prunes as above. A key of the wrong type has no fields.
READ_HASHES = """
local found, known, fields = {}, {}, ARGV[2] + 2
for index = fields + 1, #ARGV, 2 do known[ARGV[index]] = ARGV[index + 1] end
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local key = ARGV[1] .. id
  local value = redis.pcall('HGET', key, ARGV[3])
  if not value or value ~= known[id] then
    if redis.call('EXISTS', key) == 1 then
      value = redis.pcall('HMGET', key, unpack(ARGV, 3, fields))
      if value.err then value = {} end
    else
      value = nil
      redis.pcall('SREM', KEYS[1], id)
    end
  end
  if value then
    found[#found + 1] = id
    found[#found + 1] = value
  end
end
return found
"""

# KEYS: hot, the set of writers. ARGV: key prefix of the writers' own sorted sets, entries to keep, seconds to live.
# `hot` becomes the sum over live writers. It is recomputed, not added to, so a repeated flush counts once. A writer whose
# own set has expired adds nothing.
SUM_HOT = """
local keys = {}
for _, writer in ipairs(redis.call('SMEMBERS', KEYS[2])) do keys[#keys + 1] = ARGV[1] .. writer end
redis.call('ZUNIONSTORE', KEYS[1], #keys, unpack(keys))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""

# KEYS: placement, epoch. ARGV: epoch, JSON, seconds to live. -> 1 if stored, else 0. An unreadable placement counts as
# none, as in readers.
SET_PLACEMENT = """
local epoch = nil
local text = redis.call('GET', KEYS[1])
if text then
  local readable, current = pcall(cjson.decode, text)
  if readable and type(current) == 'table' then epoch = tonumber(current.epoch) end
end
if epoch and epoch + 1 ~= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[3])
return 1
"""

# KEYS: missing, a sorted set of "layer/expert" scored by expiry on the server's clock, in ms. ARGV: lifetime in ms, members.
REPORT_MISSING = """
local time = redis.call('TIME')
local expiry = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for member = 2, #ARGV do redis.call('ZADD', KEYS[1], string.format('%.0f', expiry), ARGV[member]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""

# KEYS: missing. -> the members that have not expired.
READ_MISSING = """
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')
"""

# KEYS: replicas, reporters and writers, which are sets of ids; the index of systems; all keys without an id. ARGV: prefix of
# the system's keys, the system's member in the index. -> 1 if all is deleted, 0 if a replica is live.
FORGET = """
local ids = redis.call('SUNION', KEYS[1], KEYS[2], KEYS[3])
for _, id in ipairs(ids) do
  if redis.call('EXISTS', ARGV[1] .. 'beat:' .. id) == 1 then return 0 end
end
for _, id in ipairs(ids) do
  for _, kind in ipairs({'replica:', 'busy:', 'load:', 'hot:'}) do redis.call('DEL', ARGV[1] .. kind .. id) end
end
redis.call('ZREM', KEYS[4], ARGV[2])
for key = 1, #KEYS do
  if key ~= 4 then redis.call('DEL', KEYS[key]) end
end
return 1
"""
