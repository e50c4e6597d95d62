-- Sets the keys from ARGV[1] up to but not ARGV[2], and none from ARGV[3] on, to 512 bytes each. A hundred at a time,
-- and with some hundred values in all: that is what an emulated processor can do in good time.
local letters = {}
for i = 1, 1024 do
    letters[i] = string.char(math.random(33, 126))
end
local pool = table.concat(letters)
local values = {}
for i = 1, 500 do
    values[i] = string.sub(pool, i, i + 511)
end
local last = math.min(tonumber(ARGV[2]), tonumber(ARGV[3])) - 1
for first = tonumber(ARGV[1]), last, 100 do
    local words = {}
    for i = first, math.min(first + 99, last) do
        words[#words + 1] = string.format('key:%012d', i)
        words[#words + 1] = values[1 + i % 500]
    end
    redis.call('MSET', unpack(words))
end
return last
