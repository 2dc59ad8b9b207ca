"""The Lua scripts of `redis.py`: each makes one read or write atomic. They need Redis 5 or Valkey, or newer.

All keys share the slot of their `{app}` braces, so a script may derive key names from the prefix it is given.
"""

# KEYS: a set of ids. ARGV: prefix of their keys, digest of an earlier answer, prefixes of what is removed with an id.
# -> [digest] where that is the answer still, else [digest, id, value, id, value, …]. Ids whose key has expired, or is of
# a wrong type, leave the set. One step, so that a key renewed meanwhile can't be pruned.
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
      redis.call('SREM', KEYS[1], id)
      for prefix = 3, #ARGV do redis.call('DEL', ARGV[prefix] .. id) end
    end
  end
end
found[1] = redis.sha1hex(table.concat(found, ' '))
if found[1] == ARGV[2] then return {found[1]} end
return found
"""

# KEYS: a set of ids. ARGV: key prefix, how many fields, their names (`stamp` first), then id, stamp of those known.
# -> [id, stamp where that is known, else [field value or nil, …], …]; prunes as above. A wrong type reads as no fields.
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
      redis.call('SREM', KEYS[1], id)
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
# A writer whose own set has expired adds nothing.
# `hot` is the sum over live writers: recomputed, never added to, so a repeated flush counts once.
SUM_HOT = """
local keys = {}
for _, writer in ipairs(redis.call('SMEMBERS', KEYS[2])) do keys[#keys + 1] = ARGV[1] .. writer end
redis.call('ZUNIONSTORE', KEYS[1], #keys, unpack(keys))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[3])
"""

# KEYS: placement, epoch. ARGV: epoch, JSON. -> 1 if stored. An unreadable placement counts as none, as it does for readers.
SET_PLACEMENT = """
local epoch = nil
local text = redis.call('GET', KEYS[1])
if text then
  local readable, current = pcall(cjson.decode, text)
  if readable and type(current) == 'table' then epoch = tonumber(current.epoch) end
end
if epoch and epoch + 1 ~= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[1])
return 1
"""

# KEYS: wake, a sorted set of "layer/expert" by the server's own milliseconds of expiry. ARGV: milliseconds, members.
WAKE = """
local time = redis.call('TIME')
local expiry = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for member = 2, #ARGV do redis.call('ZADD', KEYS[1], string.format('%.0f', expiry), ARGV[member]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""

# KEYS: wake. -> the members that have not expired.
WAKES = """
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
